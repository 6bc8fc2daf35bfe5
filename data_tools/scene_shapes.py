"""Shapes of the synthetic scenes and where rays meet them, exactly.

The stage frame: x and z along the ground, y down, the ground at y = 0, so things stand at negative y. Metres throughout.
Rays are an origin [3, 1] or [3, N] and directions [3, N]; a hit is the factor [N] of the direction, inf where a ray misses.
With directions whose camera z is 1 the factor is the z-depth. Results have the dtype of the directions.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Vector = tuple[float, float, float]

NEAREST = 1e-4  # hits closer than this belong to the surface that the ray starts on
LEAST_SLOPE = 1e-12  # a direction along a side of a box is turned by this much instead of dividing by zero


class Sphere(NamedTuple):
    """A sphere seen from outside, or from `inside`."""

    centre: Vector
    radius: float
    inside: bool = False


class Box(NamedTuple):
    """A box of the given half extents, turned about y, seen from outside, or from `inside`."""

    centre: Vector
    half: Vector
    yaw_rad: float = 0.0
    inside: bool = False


class Level(NamedTuple):
    """A horizontal plane of which one sees the upper side (`facing` -1, a floor) or the lower one (1, a ceiling)."""

    y: float = 0.0
    facing: float = -1.0


Shape = Sphere | Box | Level


def meet(shape: Shape, origin: Array, directions: Array) -> Array:
    """The first hit [N] of every ray."""
    match shape:
        case Sphere():
            return _meet_sphere(shape, origin, directions)
        case Box():
            return _meet_box(shape, origin, directions)
        case Level():
            with np.errstate(divide="ignore", invalid="ignore"):  # a ray along the plane never meets it
                return _ahead((shape.y - origin[1]) / directions[1])


def normal(shape: Shape, points: Array) -> Array:
    """Unit normals [3, N] towards the viewer at points of the surface."""
    match shape:
        case Sphere():
            return (points - _column(shape.centre, points)) / (-shape.radius if shape.inside else shape.radius)
        case Box():
            inner = local_points(shape, points)
            face = np.abs(inner / _column(shape.half, points)).argmax(axis=0)
            side = np.zeros_like(inner)
            lane = np.arange(inner.shape[1])
            side[face, lane] = np.sign(inner[face, lane]) * (-1 if shape.inside else 1)
            return _turn(side, shape.yaw_rad)
        case Level():
            upright = np.zeros_like(points)
            upright[1] = shape.facing
            return upright


def local_points(shape: Shape, points: Array) -> Array:
    """Points [3, N] in the shape's own frame, so that textures travel and turn with it."""
    match shape:
        case Sphere():
            return points - _column(shape.centre, points)
        case Box():
            return _turn(points - _column(shape.centre, points), -shape.yaw_rad)
        case Level():
            return points


def dot(a: Array, b: Array) -> Array:
    """Inner products [N] of vectors [3, N]; faster than a sum over an axis of three."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _meet_sphere(sphere: Sphere, origin: Array, directions: Array) -> Array:
    away = origin - _column(sphere.centre, directions)
    squared = dot(directions, directions)
    along = dot(away, directions)
    inside = along**2 - squared * (dot(away, away) - sphere.radius**2)
    root = np.sqrt(np.maximum(inside, 0))
    factor = (-along + root if sphere.inside else -along - root) / squared
    return _ahead(np.where(inside >= 0, factor, np.inf))


def _meet_box(box: Box, origin: Array, directions: Array) -> Array:
    start = _turn(origin - _column(box.centre, directions), -box.yaw_rad)
    slope = _sloped(_turn(directions, -box.yaw_rad))
    half = _column(box.half, directions)
    # Between the two planes of each axis the ray is within `enter` and `leave`.
    middle, reach = -start / slope, np.abs(half / slope)
    # Chained maxima of rows are several times faster than reductions over an axis of three.
    enter = np.maximum(np.maximum(*(middle - reach)[:2]), middle[2] - reach[2])
    leave = np.minimum(np.minimum(*(middle + reach)[:2]), middle[2] + reach[2])
    return _ahead(np.where(enter <= leave, leave if box.inside else enter, np.inf))


def _ahead(factor: Array) -> Array:
    return np.where(factor > NEAREST, factor, np.inf)


def _sloped(slope: Array) -> Array:
    return np.where(np.abs(slope) < LEAST_SLOPE, slope.dtype.type(LEAST_SLOPE), slope)


def _turn(vectors: Array, yaw_rad: float) -> Array:
    """Vectors [3, N] turned about y: z goes towards x."""
    cos, sin = math.cos(yaw_rad), math.sin(yaw_rad)
    x, y, z = vectors
    return np.stack((cos * x + sin * z, y, cos * z - sin * x))


def _column(vector: Vector, like: Array) -> Array:
    return np.array(vector, like.dtype)[:, None]
