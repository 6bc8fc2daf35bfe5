"""Colours of the synthetic surfaces: patterns over a surface's own coordinates, in linear RGB."""

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from data_tools.scene_shapes import Array, Vector, dot

Pattern = Literal["plain", "checkered", "striped", "spotted", "speckled", "tiled", "brick", "sky", "panels"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)

LATTICE = 16  # value noise repeats after this many cells, a power of two
GRAIN_M = 0.25  # size of the fine mottling that every lit surface has
GRAIN = 0.22  # its contrast
# The share of the second colour, towards which a pattern fades where its cells are smaller than a pixel.
SHARE = {"plain": 0.0, "checkered": 0.5, "striped": 0.5, "spotted": 0.25, "speckled": 0.5, "tiled": 0.1, "brick": 0.2}


class Texture(NamedTuple):
    """A pattern in two colours whose cells measure `cell_m`; `offset` (in cells) says where it begins."""

    pattern: Pattern
    colour: Vector
    second: Vector
    cell_m: float = 0.5
    offset: Vector = (0.0, 0.0, 0.0)


def albedo(texture: Texture, points: Array, footprint_m: Array) -> Array:
    """Linear colours [3, N] at points [3, N] of a surface's own frame; a pixel there covers `footprint_m` [N]."""
    first, second = (np.array(colour, points.dtype)[:, None] for colour in (texture.colour, texture.second))
    if texture.pattern in ("sky", "panels"):
        return _dome(texture, points, first, second)
    cells = points / texture.cell_m + np.array(texture.offset, points.dtype)[:, None]
    fade = np.clip(1.6 - 2 * footprint_m / texture.cell_m, 0, 1)
    mask = SHARE[texture.pattern] + fade * (_mask(texture.pattern, cells) - SHARE[texture.pattern])
    calm = np.clip(1.6 - 2 * footprint_m / GRAIN_M, 0, 1)
    grain = value_noise(points / GRAIN_M + np.array(texture.offset, points.dtype)[:, None]) - 0.5
    return (first + (second - first) * mask) * (1 + GRAIN * calm * grain)


def value_noise(cells: Array) -> Array:
    """Smooth noise [N] in 0..1 over coordinates [3, N], the same for everyone."""
    corner = np.floor(cells)
    x, y, z = (cells - corner) ** 2 * (3 - 2 * (cells - corner))
    i, j, k = corner.astype(np.int32)
    last = LATTICE - 1
    value = np.zeros_like(x)
    for di, wx in ((0, 1 - x), (1, x)):
        for dj, wy in ((0, 1 - y), (1, y)):
            row = (((i + di) & last) * LATTICE + ((j + dj) & last)) * LATTICE
            low, high = _NOISE[row + (k & last)], _NOISE[row + ((k + 1) & last)]
            value += wx * wy * (low + (high - low) * z)
    return value


def _mask(pattern: Pattern, cells: Array) -> Array:
    """Where the second colour shows, [N] in 0..1."""
    x, y, z = cells
    match pattern:
        case "checkered":
            return ((np.floor(x) + np.floor(y) + np.floor(z)) % 2).astype(x.dtype)
        case "striped":
            return (np.floor(y + 0.5 * (x + z)) % 2).astype(x.dtype)
        case "spotted":
            middle = cells - np.floor(cells) - 0.5
            return (dot(middle, middle) < 0.16).astype(x.dtype)
        case "speckled":
            rough = 0.65 * value_noise(cells) + 0.35 * value_noise(2.7 * cells + 5)
            return np.clip(4 * rough - 1.5, 0, 1)
        case "tiled":
            return ((x - np.floor(x) < 0.05) | (z - np.floor(z) < 0.05)).astype(x.dtype)
        case "brick":
            course = np.floor(2 * y)
            along = x + z + 0.5 * (course % 2)
            return ((2 * y - course < 0.12) | (along - np.floor(along) < 0.06)).astype(x.dtype)
        case _:
            return np.zeros_like(x)


def _dome(texture: Texture, points: Array, horizon: Array, zenith: Array) -> Array:
    """A gradient from the horizon to the zenith with clouds, or with painted panels."""
    x, y, z = points / np.sqrt(dot(points, points))
    colour = horizon + (zenith - horizon) * np.clip(-1.6 * y, 0, 1) ** 0.7
    if texture.pattern == "panels":
        panel = np.floor(np.arctan2(x, z) / np.pi * 16) + np.floor(np.arcsin(np.clip(-y, -1, 1)) / np.pi * 16)
        return colour * (1 - 0.14 * (panel % 2))
    above = np.maximum(0.25 - y, 0.05)
    flat = np.stack((3 * x / above, np.full_like(x, texture.offset[1]), 3 * z / above))
    cloud = 0.6 * value_noise(flat) + 0.3 * value_noise(2 * flat + 3) + 0.1 * value_noise(4 * flat + 7)
    cover = np.clip(4 * cloud - 2.1, 0, 1) * np.clip(-6 * y, 0, 1)
    return colour + (np.array((0.95, 0.95, 0.97), x.dtype)[:, None] - colour) * 0.8 * cover


def _lattice() -> NDArray[np.float32]:
    return np.random.default_rng(0).random(LATTICE**3, dtype=np.float32)


_NOISE = _lattice()
