"""Pictures and exact labels of surfaces seen by a pinhole camera."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.scene_shapes import Array, Box, Shape, Sphere, Vector, dot, local_points, meet, normal
from data_tools.scene_textures import Texture, albedo

BAND_RAYS = 1 << 15  # rays at a time: their arrays stay in the processor's cache
SAMPLES = 2  # colour rays along each side of a pixel
WARM = (1.0, 0.0, -1.0)  # what a glow adds to red, green and blue
LIFT_M = 2e-3  # shadow rays start this far above their surface


class Surface(NamedTuple):
    """A shape and its looks; `casts` shadows, is `lit` or shines by itself, has `depth` or counts as infinitely far."""

    shape: Shape
    texture: Texture
    casts: bool = True
    lit: bool = True
    depth: bool = True


class Light(NamedTuple):
    """A lamp (or far away, the sun), light from all around, and the haze that far things fade into.

    The air is warm towards `glow` and cool away from it, the more the longer it is.
    """

    position: Vector
    strength: float
    ambient: Vector
    haze: Vector
    haze_m: float
    glow: Vector


class View(NamedTuple):
    """A pinhole camera in the stage frame with square pixels and a centred principal point."""

    stage_from_cam: NDArray[np.float64]  # [4, 4]
    focal_px: float
    height: int
    width: int


class Labels(NamedTuple):
    """Exact values at the pixel centres; NaN depth where there is only sky."""

    depth_m: NDArray[np.float64]  # [H, W]
    surface: NDArray[np.int64]  # [H, W], index of the surface that is seen


def camera_directions(view: View, samples: int = 1) -> Array:
    """Directions [3, samples H, samples W] in camera coordinates with z = 1, through `samples` points a pixel side."""
    u = (np.arange(view.width * samples) + 0.5) / samples
    v = (np.arange(view.height * samples) + 0.5) / samples
    x, y = np.meshgrid((u - view.width / 2) / view.focal_px, (v - view.height / 2) / view.focal_px)
    return np.stack((x, y, np.ones_like(x)))


def render_labels(surfaces: Sequence[Surface], view: View) -> Labels:
    """The z-depth of the first surface on the ray through every pixel centre."""
    depth = np.empty((view.height, view.width))
    seen = np.empty((view.height, view.width), np.int64)
    directions = camera_directions(view)
    for rows in _bands(view.height, view.width):
        origin, rays = _stage_rays(view, directions[:, rows], np.float64)
        factor, index = _first_hit(surfaces, origin, rays)
        depth[rows], seen[rows] = factor.reshape(-1, view.width), index.reshape(-1, view.width)
    without = [index for index, surface in enumerate(surfaces) if not surface.depth]
    depth[np.isin(seen, without)] = np.nan
    return Labels(depth, seen)


def render_colour(surfaces: Sequence[Surface], light: Light, view: View) -> NDArray[np.uint8]:
    """The picture [H, W, 3], smoothed over the pixels."""
    picture = np.empty((view.height, view.width, 3), np.uint8)
    directions = camera_directions(view, SAMPLES)
    for rows in _bands(view.height, view.width * SAMPLES**2):
        fine = slice(rows.start * SAMPLES, rows.stop * SAMPLES)
        origin, rays = _stage_rays(view, directions[:, fine], np.float32)
        colour = _shade(surfaces, light, origin, rays, 1 / view.focal_px)
        sharp = colour.reshape(3, -1, view.width * SAMPLES)
        mean = np.zeros_like(sharp[:, ::SAMPLES, ::SAMPLES])
        for i, j in np.ndindex(SAMPLES, SAMPLES):
            mean += sharp[:, i::SAMPLES, j::SAMPLES] / SAMPLES**2
        picture[rows] = np.moveaxis(_display(mean), 0, -1)
    return picture


def _bands(height: int, row_rays: int) -> list[slice]:
    step = max(1, BAND_RAYS // row_rays)
    return [slice(top, min(top + step, height)) for top in range(0, height, step)]


def _stage_rays(view: View, directions: Array, dtype: type[np.floating]) -> tuple[Array, Array]:
    """Origin [3, 1] and directions [3, N] in the stage frame."""
    x, y, z = directions.reshape(3, -1)
    turned = [row[0] * x + row[1] * y + row[2] * z for row in view.stage_from_cam[:3, :3]]
    return view.stage_from_cam[:3, 3:].astype(dtype), np.stack(turned).astype(dtype)


def _first_hit(surfaces: Sequence[Surface], origin: Array, rays: Array) -> tuple[Array, NDArray[np.int64]]:
    nearest = np.full(rays.shape[1], np.inf, rays.dtype)
    index = np.full(rays.shape[1], -1)
    for number, surface in enumerate(surfaces):
        factor = meet(surface.shape, origin, rays)
        closer = factor < nearest
        nearest[closer], index[closer] = factor[closer], number
    if (index < 0).any():
        raise ValueError("a ray leaves the scene; every scene needs a room or a dome around it")
    return nearest, index


def _shade(surfaces: Sequence[Surface], light: Light, origin: Array, rays: Array, pixel: float) -> Array:
    """Linear colours [3, N]: Lambert's law with hard shadows, ambient light dimmed near other things, haze and glow."""
    factor, index = _first_hit(surfaces, origin, rays)
    colour = np.empty_like(rays)
    for number, surface in enumerate(surfaces):
        chosen = np.flatnonzero(index == number)
        if not len(chosen):
            continue
        towards, far = rays[:, chosen], factor[chosen]
        points = origin + far * towards
        facing = normal(surface.shape, points)
        length = np.sqrt(dot(towards, towards))
        grazing = np.maximum(-dot(facing, towards) / length, 0.05)
        own = albedo(surface.texture, local_points(surface.shape, points), pixel * far / grazing)
        if surface.lit:
            own = own * _light_at(surfaces, number, light, points, facing)
            haze = 1 - np.exp(-((far * length / light.haze_m) ** 2))
            own = own + (np.array(light.haze, own.dtype)[:, None] - own) * haze
        colour[:, chosen] = own
    warmth = dot(np.array(light.glow, rays.dtype)[:, None], rays) / np.sqrt(dot(rays, rays))
    return colour * (1 + np.array(WARM, rays.dtype)[:, None] * warmth)


def _light_at(surfaces: Sequence[Surface], number: int, light: Light, points: Array, facing: Array) -> Array:
    """Incoming light [3, N]."""
    to_light = np.array(light.position, points.dtype)[:, None] - points
    distance = np.sqrt(dot(to_light, to_light))
    to_light = to_light / distance
    direct = light.strength * np.maximum(dot(facing, to_light), 0)
    start = points + LIFT_M * facing
    openness = np.ones_like(direct)
    for other, surface in enumerate(surfaces):
        if not surface.casts:
            continue
        blocked = meet(surface.shape, start, to_light) < distance
        direct[blocked] = 0
        if other != number:
            openness *= 1 - _nearby(surface.shape, points, facing)
    # Light from above is stronger than light from below.
    ambient = np.array(light.ambient, points.dtype)[:, None] * ((0.8 - 0.2 * facing[1]) * openness)
    return ambient + direct


def _nearby(shape: Shape, points: Array, facing: Array) -> Array:
    """The share [N] of the ambient light that a shape keeps away, taken as a sphere of about its size."""
    match shape:
        case Sphere():
            radius = shape.radius
        case Box():
            radius = min(shape.half)
        case _:
            return np.zeros_like(points[0])
    way = np.array(shape.centre, points.dtype)[:, None] - points
    squared = dot(way, way)
    above = np.maximum(dot(way, facing), 0) / np.sqrt(squared)
    return 0.9 * above * np.minimum(radius**2 / squared, 1)


def _display(linear: Array) -> NDArray[np.uint8]:
    """sRGB bytes of linear colours; bright light is rolled off instead of clipped."""
    rolled = np.where(linear < 0.7, linear, 1 - 0.3 * np.exp((0.7 - linear) / 0.3))
    return np.round(255 * np.clip(rolled, 0, 1) ** (1 / 2.2)).astype(np.uint8)
