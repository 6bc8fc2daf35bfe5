"""Coloured points as a binary PLY file, which every viewer of point clouds opens."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

VERTEX = np.dtype(
    [
        *((axis, "<f4") for axis in "xyz"),
        *((colour, "u1") for colour in ("red", "green", "blue")),
        ("confidence", "<f4"),
    ]
)
_TYPES = {np.dtype("<f4"): "float", np.dtype("u1"): "uchar"}


class PointCloud(NamedTuple):
    """N points."""

    points: NDArray[np.float32]  # [N, 3]
    colours: NDArray[np.uint8]  # [N, 3]
    confidence: NDArray[np.float32]  # [N]


def chosen_points(
    points: NDArray[np.float32],
    colours: NDArray[np.uint8],
    confidence: NDArray[np.float32],
    dropped: float,
    most: int,
    seed: int,
) -> PointCloud:
    """Of points [..., 3] those that are finite, without the least confident share `dropped`, and of these `most` by chance."""
    points, colours, confidence = points.reshape(-1, 3), colours.reshape(-1, 3), confidence.reshape(-1)
    rows = np.flatnonzero(np.isfinite(points).all(axis=1) & np.isfinite(confidence))
    # Stable, so that points of one confidence always fall to the same side.
    rows = np.sort(rows[np.argsort(confidence[rows], kind="stable")][int(dropped * len(rows)) :])
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    return PointCloud(points[rows], colours[rows], confidence[rows])


def ply_bytes(cloud: PointCloud) -> bytes:
    """Little-endian, a vertex a point: x y z, red green blue, confidence."""
    vertices = np.empty(len(cloud.points), VERTEX)
    for column, name in enumerate("xyz"):
        vertices[name] = cloud.points[:, column]
    for column, name in enumerate(("red", "green", "blue")):
        vertices[name] = cloud.colours[:, column]
    vertices["confidence"] = cloud.confidence
    properties = [f"property {_TYPES[VERTEX[name]]} {name}" for name in VERTEX.names or ()]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}", *properties, "end_header"]
    return ("\n".join(lines) + "\n").encode() + vertices.tobytes()
