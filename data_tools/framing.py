"""Which part of a source's frames a clip keeps, at which size: the same for pictures, labels and intrinsics.

Axes: H x W pixels. Positions are in pixels of the source's pictures; pixel centres lie at +0.5.
"""

import math
from typing import Any, Literal, NamedTuple, get_args

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.pictures import rgb
from fw_train.data.schema import SIZE_STEP
from fw_train.geometry import crop_resize_intrinsics

Fit = Literal["whole", "crop", "pad"]
FITS: tuple[Fit, ...] = get_args(Fit)


class Region(NamedTuple):
    """The part of the pictures that a label array covers; it may reach beyond them, where a tool padded them."""

    top: float
    left: float
    height: float
    width: float


class Framing(NamedTuple):
    """A crop of the pictures, then a resize."""

    picture: tuple[int, int]  # height, width
    crop: tuple[int, int, int, int]  # top, left, height, width
    size: tuple[int, int]


def unchanged(height: int, width: int) -> Framing:
    return Framing((height, width), (0, 0, height, width), (height, width))


def centred(picture: tuple[int, int], size: tuple[int, int] | None, region: Region | None) -> Framing:
    """The largest part about the centre that labels cover, of the aspect of `size`; or without resizing, if that is None."""
    covered = region or Region(0, 0, *picture)
    top, left = max(0, math.ceil(covered.top - 1e-6)), max(0, math.ceil(covered.left - 1e-6))
    bottom = min(picture[0], math.floor(covered.top + covered.height + 1e-6))
    right = min(picture[1], math.floor(covered.left + covered.width + 1e-6))
    height, width = bottom - top, right - left
    if size is None:
        kept = height // SIZE_STEP * SIZE_STEP, width // SIZE_STEP * SIZE_STEP
        if not all(kept):
            raise ValueError(f"{height}x{width} pixels are too few; give --size HxW to enlarge them")
        size = kept
    else:
        scale = min(height / size[0], width / size[1])
        kept = min(height, max(1, round(size[0] * scale))), min(width, max(1, round(size[1] * scale)))
    return Framing(picture, (top + (height - kept[0]) // 2, left + (width - kept[1]) // 2, *kept), size)


def fitted_region(picture: tuple[int, int], labels: tuple[int, int], fit: Fit) -> Region:
    """What a network saw of pictures (height, width): all, stretched; the largest centred part of its aspect; all and a border."""
    if fit == "whole":
        return Region(0, 0, *picture)
    scales = picture[0] / labels[0], picture[1] / labels[1]
    scale = min(scales) if fit == "crop" else max(scales)
    height, width = labels[0] * scale, labels[1] * scale
    return Region((picture[0] - height) / 2, (picture[1] - width) / 2, height, width)


def frame_picture(picture: NDArray[np.uint8], framing: Framing) -> NDArray[np.uint8]:
    """A picture [H, W, 3] cropped and resized."""
    top, left, height, width = framing.crop
    cropped = np.ascontiguousarray(picture[top : top + height, left : left + width])
    if (height, width) == framing.size:
        return cropped
    frame = av.VideoFrame.from_ndarray(cropped, format="rgb24")
    return rgb(frame.reformat(width=framing.size[1], height=framing.size[0], interpolation="BICUBIC"))


def frame_intrinsics(intrinsics_frac: Tensor, framing: Framing) -> Tensor:
    """Fractions [..., 4] of the pictures to those of the clip's frames."""
    return crop_resize_intrinsics(intrinsics_frac, framing.picture, framing.crop)


def frame_labels(labels: NDArray[Any], region: Region | None, framing: Framing) -> NDArray[np.float32]:
    """The nearest value [H, W, ...] of labels for each of the clip's pixels, never a mix of two; NaN beyond the region."""
    region = region or Region(0, 0, *framing.picture)
    top, left, height, width = framing.crop
    rows, row_covered = _nearest(top, height, framing.size[0], region.top, region.height, labels.shape[0])
    columns, column_covered = _nearest(left, width, framing.size[1], region.left, region.width, labels.shape[1])
    with np.errstate(over="ignore"):
        taken = labels[rows[:, None], columns].astype(np.float32)
    taken[~(row_covered[:, None] & column_covered)] = np.nan
    return taken


def region_intrinsics(intrinsics_frac: Tensor, region: Region, picture: tuple[int, int]) -> Tensor:
    """Fractions [..., 4] of a region to those of the pictures that it lies in."""
    rows, columns = picture
    scale = torch.tensor([region.width / columns, region.height / rows] * 2, dtype=intrinsics_frac.dtype)
    offset = torch.tensor([0, 0, region.left / columns, region.top / rows], dtype=intrinsics_frac.dtype)
    return intrinsics_frac * scale + offset


def _nearest(
    start: int, length: int, pixels: int, region_start: float, region_length: float, values: int
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    centres = start + (np.arange(pixels) + 0.5) * (length / pixels)
    index = np.floor((centres - region_start) * (values / region_length)).astype(np.intp)
    return index.clip(0, values - 1), (index >= 0) & (index < values)
