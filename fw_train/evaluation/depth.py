"""How far predicted depth is from the true one, and how steadily; one clip at a time.

Axes: T frames, H x W pixels. Depth is in scene scales. What stands at invalid pixels, NaN included, says nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_DEPTH = 1e-3  # scene scales; an alignment may push a depth behind the camera, where it has no ratio to the true one
DELTA = 1.25


class DepthErrors(NamedTuple):
    """Means over the valid pixels of all frames, fp64 scalars."""

    absrel: Tensor  # |p - y| / y
    rmse: Tensor  # root of the mean of (p - y)^2, scene scales
    delta1: Tensor  # share of pixels whose larger one of p / y and y / p is below 1.25


def depth_errors(prediction: Tensor, label: Tensor, valid: Tensor) -> DepthErrors:
    """Compares depth [T, H, W] where `valid` [T, H, W], which must be somewhere."""
    p, y = prediction[valid].double(), label[valid].double()
    error, positive = p - y, p.clamp_min(MIN_DEPTH)
    return DepthErrors(
        absrel=(error.abs() / y).mean(),
        rmse=error.square().mean().sqrt(),
        delta1=(torch.maximum(positive / y, y / positive) < DELTA).double().mean(),
    )


def align_scale_shift(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """a * prediction + b, fp64 [T, H, W], with the one a and b of the clip that leave the least squares at valid pixels.

    A flat prediction becomes the label's mean.
    """
    p, y = prediction[valid].double(), label[valid].double()
    spread = p - p.mean()
    variance = spread.square().mean()
    # Below the resolution of fp32 the spread is rounding, and any slope would fit it.
    flat = variance <= (1e-6 * p.abs().amax()).square()
    scale = torch.where(flat, 0, (spread * y).mean() / variance)
    return scale * (prediction.double() - p.mean()) + y.mean()


def depth_flicker(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Mean change of the relative error (p - y) / y from a frame to the next, at pixels [T, H, W] valid in both; fp64 scalar.

    Depth that is wrong by the same factor in all frames does not flicker.
    """
    relative = torch.where(valid, prediction.double() / torch.where(valid, label.double(), 1) - 1, 0)
    return relative.diff(dim=0).abs()[valid[1:] & valid[:-1]].mean()
