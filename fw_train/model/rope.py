"""Rotary position tables over (frame, row, column), in real fp32 arithmetic.

A table is one fp32 tensor [L, head_dim/2, 2] that holds (cos, sin) of each token's rotation per channel pair.
"""

import torch
from torch import Tensor

BASE = 10_000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode the frame, the row and the column."""
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"head width {head_dim} cannot hold three rotary axes; use an even width of at least 6")
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """The table [F*h*w, head_dim/2, 2] of a latent grid (F, h, w)."""
    angles = []
    for axis, (length, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
        # fp64 until the cosine: positions times frequencies are exact to the last fp32 bit whatever the device.
        frequency = BASE ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angle = torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequency)
        shape = [1, 1, 1, angle.shape[1]]
        shape[axis] = length
        angles.append(angle.view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()


def extend_unrotated(table: Tensor, extra: int) -> Tensor:
    """Appends `extra` tokens without a position: the identity rotation 1+0i (zeros would erase their queries and keys)."""
    identity = table.new_zeros(extra, *table.shape[1:])
    identity[..., 0] = 1
    return torch.cat((table, identity))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the channel pairs of fp32 x [B, L, heads, head_dim] by table [L, head_dim/2, 2]."""
    if table.dtype != torch.float32:  # an engine that casts inputs would do this silently
        raise TypeError(f"rotary tables must be float32, got {table.dtype}")
    # (a, b) -> (a cos - b sin, b cos + a sin), as x * (cos, cos) + swapped x * (-sin, sin): no strided halves, one copy.
    cos, sin = table.unsqueeze(1).unbind(-1)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos.repeat_interleave(2, -1), swapped, torch.stack((-sin, sin), dim=-1).flatten(-2))
