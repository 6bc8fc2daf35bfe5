"""Small layers that compute in fp32 on weights of any dtype, and the two elementwise steps around every sub-block.

These are the network's fp32 islands: the tiny weights are upcast inside forward, the parameters stay in the model's dtype.
Throughout the network, `reset_parameters` initialises a module's own parameters and leaves those of its children alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fp32Linear(nn.Linear):
    """A linear layer whose input, weight and product are fp32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


class ZeroLinear(nn.Linear):
    """A linear layer that starts as zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LayerNorm(nn.LayerNorm):
    """Affine layer norm over the last axis, computed in fp32, returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32 and left there: rotation follows before the cast."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


def norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, in the dtype of x."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) * (1 + scale) + shift in fp32, in the dtype of x; shift and scale are fp32 [B, 1, D]."""
    if x.shape[0] == 1:  # one sample: its scale and shift can ride in the norm's own kernel
        return F.layer_norm(x.float(), x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps).to(x.dtype)
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y in fp32, in the dtype of x."""
    return torch.addcmul(x, gate.float(), y).to(x.dtype)
