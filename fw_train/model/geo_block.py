"""A geometry block: the Wan block of the same index, plus a pose adapter and attention within each frame.

Axes: B batch, F latent frames, N = F*P video tokens (P of a frame), E special tokens behind them, D width.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from fw_train.model.layers import ZeroLinear, add_gated, norm
from fw_train.model.wan import SelfAttention, WanBlock, WanParams


class FrameAttention(SelfAttention):
    """Attention among the tokens of one frame, behind a per-channel gate that starts at zero."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__(dim, heads, eps)
        self.eps = eps
        self.gate = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gate)

    def forward(self, video: Tensor, rope: Tensor) -> Tensor:
        """video [B, F*P, D], rope [P, ...] of one frame."""
        tokens = rearrange(norm(video, self.eps), "b (f p) d -> (b f) p d", p=rope.shape[0])
        attended = rearrange(super().forward(tokens, rope), "(b f) p d -> b (f p) d", b=video.shape[0])
        return add_gated(video, self.gate, attended)


class GeoBlock(WanBlock):
    """Fresh (zero adapter, zero gate) it computes exactly the Wan block whose weights it carries."""

    def __init__(self, params: WanParams) -> None:
        super().__init__(params)
        self.pose_adapter = nn.Sequential(nn.SiLU(), ZeroLinear(params.dim, params.dim))
        self.frame_attn = FrameAttention(params.dim, params.heads, params.eps)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        text: Tensor,
        image: Tensor | None,
        time: Tensor,
        rope: Tensor,
        frame_rope: Tensor,
        pose: Tensor,
        pose_on: Tensor,
    ) -> Tensor:
        """x [B, N+E, D], rope [N+E, ...], frame_rope [P, ...] of the first frame, pose [B, F, D], pose_on [B, 1, 1] of 0 or 1."""
        modulation = self.time_modulation(time)
        x = self.attend_self(x, modulation, rope)
        length = pose.shape[1] * frame_rope.shape[0]
        video, special = x.tensor_split([length], dim=1)
        video = add_per_frame(video, self.pose_adapter(pose) * pose_on)
        video = self.frame_attn(video, frame_rope)
        return self.attend_context(torch.cat((video, special), dim=1), modulation, text, image)


def add_per_frame(tokens: Tensor, shift: Tensor) -> Tensor:
    """Adds shift [B, F, D] to all tokens [B, F*P, D] of its frame."""
    return (tokens.unflatten(1, (shift.shape[1], -1)) + shift.unsqueeze(2)).flatten(1, 2)
