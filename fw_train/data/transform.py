"""Cutting a window out of frames and scaling it: video, depth, points and intrinsics together.

Labels are never blended: a mean of two depths at an edge is a surface that is not there. Each new pixel takes the old pixel
that its centre lies in, the same one for depth, points and validity. Video is blended. Intrinsics follow the window exactly.

Axes: `...` any leading axes, H x W pixels.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from einops import pack, unpack
from torch import Tensor
from torch.nn.functional import interpolate

from fw_train.data.codec import Codes
from fw_train.data.video import Window
from fw_train.geometry import crop_resize_intrinsics


class CropResize(NamedTuple):
    """A window of frames of the size `source`, scaled to the size `to`; sizes are height, width."""

    source: tuple[int, int]
    window: Window  # top, left, height, width; all even, since chroma has half the resolution
    to: tuple[int, int]

    @property
    def keeps_all(self) -> bool:
        return self.window == (0, 0, *self.source)

    @property
    def scales(self) -> bool:
        return self.window[2:] != self.to

    @property
    def slack(self) -> tuple[int, int]:
        """How far, in steps of two pixels, the window can move down and to the right of the corner."""
        return (self.source[0] - self.window[2]) // 2, (self.source[1] - self.window[3]) // 2

    def moved(self, down: int, right: int) -> "CropResize":
        """The window `down` and `right` steps of two pixels from the corner."""
        return self._replace(window=(2 * down, 2 * right, *self.window[2:]))


def cover_crop(height: int, width: int, to_height: int, to_width: int) -> CropResize:
    """The largest centred window of the wanted shape, which scaled covers the wanted size."""
    scale = min(height / to_height, width / to_width)
    window = _even(min(height, to_height * scale)), _even(min(width, to_width * scale))
    crop = CropResize((height, width), (0, 0, *window), (to_height, to_width))
    return crop.moved(*(steps // 2 for steps in crop.slack))


def nearest_size(height: int, width: int, sizes_px: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The size whose shape is nearest; of equal shapes the one nearest in area."""

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        shape = (size[0] * width) / (size[1] * height)
        area = (size[0] * size[1]) / (height * width)
        return round(max(shape, 1 / shape), 6), max(area, 1 / area)

    return min(sizes_px, key=distance)


def crop_resize_labels(labels: Tensor, crop: CropResize) -> Tensor:
    """Depth, points or validity [..., H, W]; rows and columns behind the window may be missing already."""
    top, left, height, width = crop.window
    if not crop.scales:
        return labels[..., top : top + height, left : left + width]
    rows, columns = (
        # Whole-number arithmetic: the same pixels on every device.
        start + ((2 * torch.arange(wanted, device=labels.device) + 1) * side) // (2 * wanted)
        for start, side, wanted in ((top, height, crop.to[0]), (left, width, crop.to[1]))
    )
    return labels.index_select(-2, rows).index_select(-1, columns)


def resize_video(rgb: Tensor, crop: CropResize) -> Tensor:
    """Frames [..., 3, H, W] of the window, which was cut out in decoding, scaled."""
    if not crop.scales:
        return rgb
    flat, leading = pack([rgb], "* c h w")
    scaled = interpolate(flat, crop.to, mode="bilinear", antialias=True, align_corners=False)
    return unpack(scaled, leading, "* c h w")[0]


def crop_intrinsics(intrinsics_frac: Tensor, crop: CropResize) -> Tensor:
    """Fractions [..., 4] that refer to the result."""
    return crop_resize_intrinsics(intrinsics_frac, crop.source, crop.window)


def cut_codes(codes: Codes, crop: CropResize) -> Codes:
    """Codes without what lies below and to the right of the window: deltas need all that is above and to the left of it."""
    bottom, right = crop.window[0] + crop.window[2], crop.window[1] + crop.window[3]
    kept = ..., slice(bottom), slice(right)
    deltas, exact = np.ascontiguousarray(codes.deltas[kept]), np.ascontiguousarray(codes.exact[kept])
    return codes._replace(deltas=deltas, exact=exact, exact_valid=np.ascontiguousarray(codes.exact_valid[kept]))


def _even(side: float) -> int:
    """The nearest even number; the one below where two are as near, so that a whole odd side is not exceeded."""
    return max(2, 2 * math.ceil(side / 2 - 0.5))
