"""Paths of cameras from above; plain numpy, the same bytes for the same input.

Axes: T frames. Pictures are uint8 [H, W, 3]; places on them are (column, row).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fw_train.pictures.drawing import GRID, PAPER, WHITE, Colour, Picture, stroke

WEDGE_PX, WEDGE_SPREAD = 24, 0.5  # length of the triangle at a camera, and half its width per length
PATH_PADDING_PX = 44


class Ramp(NamedTuple):
    """Colours of a path's first and last camera and of the line between them."""

    first: Colour
    last: Colour
    line: Colour


COLOURED = Ramp((60, 140, 255), (255, 180, 50), (150, 155, 165))
PALE = Ramp((122, 128, 138), (226, 229, 233), (96, 100, 110))


class CameraPath(NamedTuple):
    """Cameras in a frame with x to the right, y down and z ahead."""

    centres: NDArray[np.floating]  # [T, 3]
    forward: NDArray[np.floating]  # [T, 3], unit vectors along the optical axes


def path_of_poses(first_from_cam: NDArray[np.float64]) -> CameraPath:
    """The path of cameras [T, 4, 4]."""
    return CameraPath(first_from_cam[:, :3, 3], first_from_cam[:, :3, 2])


def path_picture(
    paths: Sequence[CameraPath],
    marked: Sequence[int],
    size: int,
    smallest: float,
    ramps: Sequence[Ramp] = (COLOURED,),
) -> Picture:
    """Paths from above, x to the right and z up: a dot a camera, a triangle along the view of the marked ones.

    The first camera of the last path has a white ring. `smallest` is the length that paths are shown at least as large as.
    """
    picture = np.full((size, size, 3), PAPER, np.uint8)
    low, high = _extent(paths)
    middle, step = (low + high) / 2, grid_step(paths, size, smallest)
    pixels = _pixels_per_unit(paths, size, smallest)
    reach = size / pixels / 2
    for axis in (0, 1):
        for number in range(int(np.ceil((middle[axis] - reach) / step)), int((middle[axis] + reach) // step) + 1):
            place = _to_pixel(np.full(2, number * step), middle, pixels, size)[axis]
            at = min(int(place), size - 1)
            picture[(slice(None), at) if axis == 0 else at] = GRID
    for path, ramp in zip(paths, ramps, strict=True):
        dots = _to_pixel(path.centres[:, (0, 2)], middle, pixels, size)
        colours = [camera_colour(t, len(dots), ramp) for t in range(len(dots))]
        for a, b in pairwise(dots):
            stroke(picture, a, b, 0.7, ramp.line)
        for t in marked:
            for a, b in _wedge(dots[t], path.forward[t, (0, 2)]):
                stroke(picture, a, b, 0.8, colours[t])
        if path is paths[-1]:
            stroke(picture, dots[0], dots[0], 7.5, WHITE)
            stroke(picture, dots[0], dots[0], 5.5, PAPER)
        for dot, colour in zip(dots, colours, strict=True):
            stroke(picture, dot, dot, 3, colour)
    return picture


def heights(path: CameraPath) -> tuple[float, float]:
    """The least and the greatest height of a path's cameras."""
    up = -path.centres[:, 1]
    return float(up.min()), float(up.max())


def grid_step(paths: Sequence[CameraPath], size: int, smallest: float) -> float:
    """The distance between grid lines of `path_picture`: 1, 2 or 5 times a power of ten."""
    wanted = size / _pixels_per_unit(paths, size, smallest) / 8
    power = 10.0 ** np.floor(np.log10(wanted))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * wanted))


def camera_colour(frame: int, frames: int, ramp: Ramp = COLOURED) -> Colour:
    """The colour of a camera's dot, from the first to the last."""
    share = frame / max(frames - 1, 1)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(ramp.first, ramp.last, strict=True))
    return red, green, blue


def _extent(paths: Sequence[CameraPath]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The least and the greatest (x, z) of all paths."""
    centres = np.concatenate([path.centres[:, (0, 2)] for path in paths])
    return centres.min(axis=0), centres.max(axis=0)


def _pixels_per_unit(paths: Sequence[CameraPath], size: int, smallest: float) -> float:
    low, high = _extent(paths)
    return float((size - 2 * PATH_PADDING_PX) / max(float((high - low).max()), smallest))


def _to_pixel(
    centres: NDArray[np.floating], middle: NDArray[np.floating], pixels: float, size: int
) -> NDArray[np.floating]:
    """Columns and rows [..., 2] of places (x, z) [..., 2] seen from above."""
    return size / 2 + (centres - middle) * pixels * np.array((1, -1))


def _wedge(
    apex: NDArray[np.floating], direction: NDArray[np.floating]
) -> list[tuple[NDArray[np.floating], NDArray[np.floating]]]:
    """The sides of a triangle that opens along a direction (x, z); shorter where the camera looks up or down."""
    ahead = WEDGE_PX * direction * np.array((1, -1))
    across = WEDGE_SPREAD * WEDGE_PX * np.array((direction[1], direction[0])) / max(np.hypot(*direction), 1e-6)
    corners = apex, apex + ahead - across, apex + ahead + across
    return [(corners[i], corners[i - 1]) for i in range(3)]
