"""Surface normals of points, and their picture; plain numpy, the same bytes for the same input. Axes: H x W pixels."""

import numpy as np
from numpy.typing import NDArray

from fw_train.pictures.colours import with_checks
from fw_train.pictures.drawing import Float, Mask, Picture, to_bytes

NORMAL_SPAN = 1 / 100  # of the width, between the points whose difference is taken: fewer pixels show the codec's steps


def surface_normals(points: Float, valid: Mask, cam_from_first: NDArray[np.float64]) -> tuple[Float, Mask]:
    """Unit normals [H, W, 3] of points [H, W, 3] in the first camera's frame, towards the camera and in its own frame.

    Along each axis the shorter of the two differences counts, so that normals hold up to the edges of things.
    """
    span = max(1, round(NORMAL_SPAN * points.shape[1]))
    points = np.where(valid[..., None], points, 0)  # the others may be NaN
    right, right_valid = _difference(points, valid, span)
    down, down_valid = _difference(points.swapaxes(0, 1), valid.swapaxes(0, 1), span)
    normals = np.cross(down.swapaxes(0, 1), right) @ cam_from_first[:3, :3].T
    length = np.linalg.norm(normals, axis=-1)
    known = right_valid & down_valid.swapaxes(0, 1) & (length > 0)
    return (normals / np.where(known, length, 1)[..., None]).astype(np.float32), known


def normal_picture(normals: Float, valid: Mask) -> Picture:
    """Normals [H, W, 3] as red to the right, green up and blue towards the camera; grey checks where not valid."""
    return with_checks(to_bytes(127.5 + 127.5 * normals * np.array((1, -1, -1))), valid)


def _difference(points: Float, valid: Mask, span: int) -> tuple[NDArray[np.float64], Mask]:
    """The shorter of the differences to the points `span` columns to the right and to the left, both rightwards."""
    steps = points[:, span:].astype(np.float64) - points[:, :-span]
    length = np.where(valid[:, span:] & valid[:, :-span], np.linalg.norm(steps, axis=-1), np.inf)
    ahead = np.pad(length, ((0, 0), (0, span)), constant_values=np.inf)
    behind = np.pad(length, ((0, 0), (span, 0)), constant_values=np.inf)
    edge, sides = np.zeros((len(points), span, 3)), (ahead <= behind)[..., None]
    shorter = np.where(sides, np.concatenate((steps, edge), axis=1), np.concatenate((edge, steps), axis=1))
    return shorter, np.isfinite(np.minimum(ahead, behind))
