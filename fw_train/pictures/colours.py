"""Depth and its errors as colours; plain numpy, the same bytes for the same input.

Axes: T frames, H x W pixels. Pictures are uint8 [H, W, 3].
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fw_train.pictures.drawing import FAINT, SMALL, Float, Mask, Picture, blank, text_width, to_bytes, write

INVALID = (104, 104, 104), (152, 152, 152)  # the two greys of the checks
CHECK = 4  # pixels along the side of a check
LEGEND_PX = 30  # its height
PERCENTILES = 2, 98  # of inverse depth, the ends of the colour map

# Colours whose lightness rises evenly, from violet over red and orange to pale yellow, in the manner of "inferno".
_HEAT = np.array(
    [
        *((36, 12, 79), (66, 10, 104), (93, 18, 110), (120, 28, 109), (147, 38, 103), (174, 48, 92)),
        *((199, 62, 76), (221, 81, 58), (237, 105, 37), (248, 133, 15), (252, 165, 10), (250, 198, 45), (242, 230, 97)),
        (252, 255, 164),
    ],
    np.float64,
)


class DepthScale(NamedTuple):
    """Inverse depths that take the two ends of the colour map; both 0 where no depth is valid."""

    far: float
    near: float


def depth_scale(depth: Float, valid: Mask) -> DepthScale:
    """The scale of a clip's depth [T, H, W] with validity [T, H, W]."""
    if not valid.any():
        return DepthScale(0.0, 0.0)
    return DepthScale(*map(float, np.percentile(1 / depth[valid].astype(np.float64), PERCENTILES)))


def depth_picture(depth: NDArray[np.floating], valid: Mask, scale: DepthScale) -> Picture:
    """Depth [H, W] with validity [H, W], bright where near; grey checks where it is not valid."""
    inverse = 1 / np.where(valid, depth, 1).astype(np.float64)
    return with_checks(heat_colours(_share(inverse, scale)), valid)


def heat_colours(share: NDArray[np.float64]) -> Picture:
    """Colours [..., 3] of numbers [...] from 0, dark, to 1, bright."""
    at = np.linspace(0, 1, len(_HEAT))
    return np.stack([to_bytes(np.interp(share, at, channel)) for channel in _HEAT.T], axis=-1)


def depth_legend(scale: DepthScale, width: int, unit: str) -> Picture:
    """A bar of the colours, near to far, with the depths at its ends."""
    if not scale.near:
        picture = blank(LEGEND_PX, width)
        write(picture, (0, 0), "no valid depth", SMALL, FAINT)
        return picture
    return heat_legend(f"{1 / scale.near:.3g}{unit}", f"{1 / scale.far:.3g}{unit}", width, rising=False)


def heat_legend(left: str, right: str, width: int, *, rising: bool) -> Picture:
    """A bar of the colours, dark to bright where `rising`, with text at its ends."""
    picture = blank(LEGEND_PX, width)
    share = np.linspace(0, 1, width)
    picture[:10] = heat_colours(share if rising else 1 - share)
    write(picture, (0, 15), left, SMALL, FAINT)
    write(picture, (width - text_width(right, SMALL), 15), right, SMALL, FAINT)
    return picture


def with_checks(picture: Picture, valid: Mask) -> Picture:
    """Grey checks instead of the pixels that are not valid [H, W]."""
    rows, columns = np.indices(valid.shape) // CHECK
    checks = np.array(INVALID, np.uint8)[(rows + columns) % 2]
    return np.where(valid[..., None], picture, checks)


def _share(inverse: NDArray[np.float64], scale: DepthScale) -> NDArray[np.float64]:
    if scale.near <= scale.far:
        return np.full(inverse.shape, 0.5)
    return np.clip((inverse - scale.far) / (scale.near - scale.far), 0, 1)
