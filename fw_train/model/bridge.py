"""The latent bridge: two plain transformer layers that carry video features into the geometry branch."""

from torch import Tensor, nn

from fw_train.model.attention import attend
from fw_train.model.layers import LayerNorm
from fw_train.model.wan import split_heads


class BridgeLayer(nn.Module):
    """Pre-norm attention and feed-forward without a positional code."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm2 = LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (split_heads(project(y), self.heads) for project in (self.q, self.k, self.v))
        x = x + self.o(attend(q, k, v).flatten(2))
        return x + self.ffn(self.norm2(x))


class LatentBridge(nn.Module):
    def __init__(self, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([BridgeLayer(dim, heads, 4 * dim) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
