"""Points as rays of a camera fitted to each frame: depth along its axis, and how far each point is off its pixel's ray.

Points that one camera saw obey P = c + z M [u, v, 1] with one centre c and one 3x3 matrix M, whatever the frame of
reference. Only z then varies freely; noise and lens distortion remain as small offsets (du, dv) of the pixel.

Axes: planes [3, H, W] hold x, y, z; a pixel (u, v) is (column, row); N samples or frames.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fw_train.data.codec_planes import CannotHold, log_codes, strips

if TYPE_CHECKING:
    from torch import Tensor

Double = NDArray[np.float64]
Array = TypeVar("Array", NDArray[np.float32], "Tensor")

GRID_PX = 8
IRLS_ROUNDS = 3
FEWEST_SAMPLES = 64  # below this the grid is given up and all valid pixels are used
EXACT_PX = 0.01  # residual at which more rounds cannot improve the fit
NEAREST_DEPTH = 0.1  # of the median depth: what lies nearer, or behind, may not outweigh the rest
ROBUST_PX = 0.1  # residual up to which a pixel keeps its full weight
# A second camera explains the frame as well as the first where the second eigenvalue is no more than this, relative to
# the largest eigenvalue and to the first one (which is the noise).
SECOND_SOLUTION, SECOND_TO_NOISE = 1e-9, 10.0
FARTHEST_CENTRE = 4.0  # the fitted centre may be this many times as far from the points as the origin is
WORST_CONDITION = 1e7
ERROR_SLACK = 0.998  # of the bound, what quantisation may use; float32 rounding takes the rest


class RayCamera(NamedTuple):
    """P = centre + z * rays @ [u, v, 1], z along the unit third row of rays' inverse."""

    rays: NDArray[np.float32]  # [3, 3]
    centre: NDArray[np.float32]  # [3]


class FrameCodes(NamedTuple):
    """One frame as integers, and what turns them back into float32."""

    codes: NDArray[np.uint16]  # [P, H, W]: log z, then for points du and dv in two's complement
    parameters: NDArray[np.float32]  # scale of z, then for points: pixels per offset step, rays by rows [9], centre [3]


def unproject(z: Array, du: Array, dv: Array, u: Array, v: Array, parameters: Array) -> tuple[Array, Array, Array]:
    """Planes x, y, z [N, H, W] from depth and offset codes [N, H, W], columns [1, W], rows [H, 1], parameters [N, 14].

    The one place where points are computed, for numpy and torch alike: single float32 operations in a fixed order, each
    rounded exactly, so that both give the same bits. torch.compile would fuse them and break that.
    """
    column: list[Any] = [parameters[:, i, None, None] for i in range(14)]
    step, m, centre = column[1], column[2:11], column[11:]
    u = u + step * du
    v = v + step * dv
    x, y, z = (centre[i] + z * ((m[3 * i] * u + m[3 * i + 1] * v) + m[3 * i + 2]) for i in range(3))
    return x, y, z


@cache
def pixel_grid(height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Columns u [1, W] and rows v [H, 1]."""
    return np.arange(width, dtype=np.float32)[None], np.arange(height, dtype=np.float32)[:, None]


def ray_codes(planes: NDArray[np.float32], valid: NDArray[np.bool_], step: float, bound: float) -> FrameCodes:
    """Codes of points [3, H, W] that decode to within `bound` of their distance from the fitted centre."""
    if not valid.any():
        return FrameCodes(np.zeros(planes.shape, np.uint16), np.zeros(14, np.float32))
    reasons = []
    # A frame seen against one plane is explained by many cameras; by only one if its centre is held at the origin.
    for held in (False, True):
        try:
            return _quantise(planes, valid, fit_camera(planes, valid, held_at_origin=held), step, bound)
        except CannotHold as reason:
            reasons.append(str(reason))
    raise CannotHold("; with the centre at the origin: ".join(reasons))


def offset_step_px(camera: RayCamera, step: float, bound: float) -> np.float32:
    """Pixels per offset code, such that rounding depth and offsets moves no point by more than `bound` of its distance.

    Depth moves a point by up to d = exp(step/2) - 1 of its distance, along its ray. Offsets move it by up to l z in the
    image plane, l cos(a) of its distance at angle a off the axis. Together that is at most l/2 + sqrt(d^2 + l^2/4),
    over all angles, so l = bound - d^2/bound.
    """
    usable, d = ERROR_SLACK * bound, np.expm1(step / 2)
    per_pixel = np.linalg.norm(camera.rays[:, :2].astype(np.float64), 2)  # 1/f for square pixels
    return np.float32(np.sqrt(2) * (usable - d**2 / usable) / per_pixel)  # two offsets, each half a step off


@np.errstate(over="ignore", invalid="ignore")  # what is not finite fails the comparisons below
def _quantise(
    planes: NDArray[np.float32], valid: NDArray[np.bool_], camera: RayCamera, step: float, bound: float
) -> FrameCodes:
    offset_step = offset_step_px(camera, step, bound)
    to_pixels = np.linalg.inv(camera.rays.astype(np.float64)).astype(np.float32)
    columns, all_rows = pixel_grid(*valid.shape)
    z = np.empty(valid.shape, np.float32)
    codes = np.empty(planes.shape, np.uint16)
    behind, farthest = 0, np.float32(0)
    for rows in strips(len(valid)):
        seen = valid[rows]
        away = planes[:, rows] - camera.centre[:, None, None]
        u, v, strip_z = (to_pixels @ away.reshape(3, -1)).reshape(away.shape)
        behind += int(np.count_nonzero((strip_z <= 0) & seen))
        strip_z[~seen] = 1
        z[rows] = strip_z
        for plane, along, pixel in ((1, u, columns), (2, v, all_rows[rows])):
            along /= strip_z
            along -= pixel
            along /= offset_step
            np.rint(along, out=along)
            along *= seen
            farthest = np.maximum(farthest, np.abs(along).max())
            codes[plane, rows] = along.astype(np.int16).view(np.uint16)
    if behind:
        raise CannotHold(
            f"{behind} points lie at or behind the fitted camera; mark them invalid if they are placeholders"
        )
    if not farthest <= 32767:
        raise CannotHold(f"a point is {farthest * offset_step:.0f} px off its pixel's ray; one camera did not see this")
    codes[0], scale = log_codes(z, valid, step)
    parameters = np.concatenate(([scale, offset_step], camera.rays.ravel(), camera.centre))
    return FrameCodes(codes, parameters.astype(np.float32))


def fit_camera(planes: NDArray[np.float32], valid: NDArray[np.bool_], *, held_at_origin: bool = False) -> RayCamera:
    """The camera that maps points [3, H, W] to their own pixels, by DLT on a pixel grid and reweighted rounds."""
    pixels, points = _samples(planes, valid)
    unknowns, count = (3 if held_at_origin else 4), points.shape[1]
    if count < 2 * unknowns:
        raise CannotHold(f"{count} valid points are too few to fit a camera")
    # For conditioning: points about their mean (or the origin) at unit distance, pixels within -1..1.
    to_unit = np.eye(4)
    if not held_at_origin:
        to_unit[:3, 3] = -points.mean(axis=1)
    to_unit[:3] /= np.sqrt(np.mean((points + to_unit[:3, 3:]) ** 2)) or 1.0
    normal = (to_unit @ np.concatenate((points, np.ones((1, count)))))[:unknowns]
    half_px, middle = max(valid.shape) / 2, np.array(valid.shape)[::-1] / 2
    target = (pixels - middle[:, None]) / half_px

    weights = np.ones(count)
    for _ in range(1 + IRLS_ROUNDS):
        errors, projection = _dlt(normal, target, weights)
        projection *= np.sign(np.median(projection[2] @ normal))
        image = projection @ normal
        nearest = NEAREST_DEPTH * np.median(image[2])
        if nearest <= 0:
            raise CannotHold("no camera has these points in front of it")
        z = np.maximum(image[2], nearest)
        residual_px = half_px * np.hypot(*(image[:2] / z - target))
        if residual_px.max() < EXACT_PX:
            break
        # Algebraic error is z times the error in the image; the rest makes large errors count by size, not by square.
        weights = 1 / (z**2 * np.maximum(residual_px, ROBUST_PX))
    if errors[1] <= max(SECOND_SOLUTION * errors[-1], SECOND_TO_NOISE * errors[0]):
        raise CannotHold("more than one camera explains the frame")
    to_px = np.array([[half_px, 0, middle[0]], [0, half_px, middle[1]], [0, 0, 1]])
    return _camera(to_px @ projection @ to_unit[:unknowns, :unknowns], points)


def _samples(planes: NDArray[np.float32], valid: NDArray[np.bool_]) -> tuple[Double, Double]:
    """Pixels [2, N] and points [3, N] at the valid pixels of a grid, or at all valid ones, thinned, if those are few."""
    half = GRID_PX // 2
    rows, columns = (half + GRID_PX * at for at in np.nonzero(valid[half::GRID_PX, half::GRID_PX]))
    if len(rows) < FEWEST_SAMPLES:
        rows, columns = np.nonzero(valid)
        thin = 1 + len(rows) // 4096
        rows, columns = rows[::thin], columns[::thin]
    return np.stack((columns, rows)).astype(np.float64), planes[:, rows, columns].astype(np.float64)


def _dlt(points: Double, target: Double, weights: Double) -> tuple[Double, Double]:
    """The projection [3, D] of unit norm that maps points [D, N] to [2, N] with the least weighted algebraic error.

    It comes after the eigenvalues: the first is that error, the second what the best projection of another kind leaves.
    """
    size = len(points)
    u, v = target
    factors = np.stack((np.ones_like(u), u, v, u * u + v * v)) * (weights / weights.sum())
    row, column = np.triu_indices(size)
    moments = np.empty((4, size, size))  # sums of point outer products, weighted by 1, u, v, u^2 + v^2
    moments[:, row, column] = moments[:, column, row] = factors @ (points[row] * points[column]).T
    one, by_u, by_v, by_both = moments
    zero = np.zeros_like(one)
    errors, vectors = np.linalg.eigh(np.block([[one, zero, -by_u], [zero, one, -by_v], [-by_u, -by_v, by_both]]))
    return errors, vectors[:, 0].reshape(3, size)


def _camera(projection: Double, points: Double) -> RayCamera:
    """The rays and centre of a projection [3, 3 or 4] that maps points [3, N] in front of it to positive z."""
    axis = np.linalg.norm(projection[2, :3])
    if axis == 0 or np.linalg.cond(projection[:, :3] / axis) > WORST_CONDITION:
        raise CannotHold("the fitted camera is singular: its rays are parallel or lie in one plane")
    projection = projection / axis
    rays = np.linalg.inv(projection[:, :3])
    centre = -rays @ projection[:, 3] if projection.shape[1] == 4 else np.zeros(3)
    # The error bound is relative to the distance from the centre, so a fit may not buy accuracy by moving it far off.
    some = points[:, ::8]
    distance, reach = (np.sqrt(np.median(np.square(some - at[:, None]).sum(axis=0))) for at in (centre, np.zeros(3)))
    if distance > FARTHEST_CENTRE * reach:
        raise CannotHold(f"the fitted camera is {distance:.3g} away from points that are {reach:.3g} from the origin")
    return RayCamera(rays.astype(np.float32), centre.astype(np.float32))
