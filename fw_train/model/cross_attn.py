"""Bidirectional cross-attention between the video and the geometry branch: one affinity, read in both directions.

m1 is the video side, m2 the geometry side (the names of the published weights).
Axes: B batch, V video tokens, G geometry tokens, D width of the branches.
"""

import torch
from torch import Tensor, nn

from fw_train.model.attention import attend
from fw_train.model.layers import add_gated, norm
from fw_train.model.rope import rotate
from fw_train.model.wan import split_heads

EPS = 1e-6


class SharedAffinity(nn.Module):
    """Queries come from m1 and keys from m2; each side reads the other's values through the same scores."""

    def __init__(self, video_dim: int, geometry_dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.m1_proj = nn.Linear(video_dim, width)
        self.m2_proj = nn.Linear(geometry_dim, width)
        self.values_m1_proj = nn.Linear(video_dim, width)
        self.values_m2_proj = nn.Linear(geometry_dim, width)
        self.out_m1_proj = nn.Linear(width, video_dim)
        self.out_m2_proj = nn.Linear(width, geometry_dim)

    def forward(
        self, video: Tensor, geometry: Tensor, video_rope: Tensor, geometry_rope: Tensor
    ) -> tuple[Tensor, Tensor]:
        q = rotate(split_heads(self.m1_proj(video), self.heads).float(), video_rope).to(video.dtype)
        k = rotate(split_heads(self.m2_proj(geometry), self.heads).float(), geometry_rope).to(geometry.dtype)
        to_video = attend(q, k, split_heads(self.values_m2_proj(geometry), self.heads))
        to_geometry = attend(k, q, split_heads(self.values_m1_proj(video), self.heads))
        return self.out_m1_proj(to_video.flatten(2)), self.out_m2_proj(to_geometry.flatten(2))


class BiCrossAttention(nn.Module):
    """Both branches are read first and updated together, through per-channel gates that start at zero."""

    def __init__(self, video_dim: int, geometry_dim: int, width: int, heads: int) -> None:
        super().__init__()
        self.cross_attn = SharedAffinity(video_dim, geometry_dim, width, heads)
        self.gamma_m1 = nn.Parameter(torch.empty(video_dim))
        self.gamma_m2 = nn.Parameter(torch.empty(geometry_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma_m1)
        nn.init.zeros_(self.gamma_m2)

    def forward(
        self, video: Tensor, geometry: Tensor, video_rope: Tensor, geometry_rope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """video [B, V, D], geometry [B, G, D], tables of head width `width / heads`; returns both, updated."""
        to_video, to_geometry = self.cross_attn(norm(video, EPS), norm(geometry, EPS), video_rope, geometry_rope)
        return add_gated(video, self.gamma_m1, to_video), add_gated(geometry, self.gamma_m2, to_geometry)
