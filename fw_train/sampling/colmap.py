"""A clip's cameras and points as the three text files of a COLMAP model, one PINHOLE camera for each frame.

COLMAP's conventions are ours: world to camera, x right, y down, z ahead, pixel centres at +0.5.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fw_train.geometry import Cameras, intrinsics_px
from fw_train.sampling.ply import PointCloud


class ColmapModel(NamedTuple):
    """The contents of cameras.txt, images.txt and points3D.txt."""

    cameras: bytes
    images: bytes
    points: bytes


def colmap_model(cameras: Cameras, size_px: tuple[int, int], names: Iterable[str], cloud: PointCloud) -> ColmapModel:
    """Points have no tracks: nothing was matched, and their error is not known (-1)."""
    height, width = size_px
    intrinsics = intrinsics_px(cameras.intrinsics_frac, height, width)
    poses = zip(
        quaternions(cameras.cam_from_world[:, :3, :3]).tolist(),
        cameras.cam_from_world[:, :3, 3].tolist(),
        names,
        strict=True,
    )
    camera_lines = [
        f"{number} PINHOLE {width} {height} {_numbers(values)}"
        for number, values in enumerate(intrinsics.tolist(), start=1)
    ]
    image_lines = [
        f"{number} {_numbers([*rotation, *translation])} {number} {name}\n"  # the empty line is that of its 2D points
        for number, (rotation, translation, name) in enumerate(poses, start=1)
    ]
    return ColmapModel(
        _text("CAMERA_ID MODEL WIDTH HEIGHT FX FY CX CY", camera_lines),
        _text("IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of 2D points", image_lines),
        _text("POINT3D_ID X Y Z R G B ERROR TRACK[]", _point_lines(cloud.points, cloud.colours)),
    )


def quaternions(rotation: Tensor) -> Tensor:
    """Unit quaternions w x y z, w not negative, of rotations [..., 3, 3]: [..., 4]."""
    m = [[rotation[..., i, j] for j in range(3)] for i in range(3)]
    # The outer product of the quaternion with itself, times four: its longest row is the quaternion, safely normalised.
    outer = torch.stack(
        [
            *(1 + m[0][0] + m[1][1] + m[2][2], m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]),
            *(m[2][1] - m[1][2], 1 + m[0][0] - m[1][1] - m[2][2], m[0][1] + m[1][0], m[0][2] + m[2][0]),
            *(m[0][2] - m[2][0], m[0][1] + m[1][0], 1 - m[0][0] + m[1][1] - m[2][2], m[1][2] + m[2][1]),
            *(m[1][0] - m[0][1], m[0][2] + m[2][0], m[1][2] + m[2][1], 1 - m[0][0] - m[1][1] + m[2][2]),
        ],
        dim=-1,
    ).unflatten(-1, (4, 4))
    longest = outer.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None].expand(*outer.shape[:-2], 1, 4)
    row = outer.gather(-2, longest).squeeze(-2)
    row = row / row.norm(dim=-1, keepdim=True)
    return torch.where(row[..., :1] < 0, -row, row)


def _point_lines(points: NDArray[np.float32], colours: NDArray[np.uint8]) -> list[str]:
    rows = zip(points.tolist(), colours.tolist(), strict=True)
    return [
        f"{number} {_numbers(point)} {' '.join(map(str, colour))} -1" for number, (point, colour) in enumerate(rows, 1)
    ]


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.17g}" for value in values)


def _text(header: str, lines: list[str]) -> bytes:
    return "\n".join([f"# {header}", *lines, ""]).encode()
