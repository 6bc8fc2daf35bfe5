"""The camera that a clip is to follow: from a file, or an orbit, dolly or pan; and all that a network takes of it.

Lengths are in scene scales (the mean distance of what is seen to the first camera), poses in the first camera's frame
(x right, y down, z ahead). Axes: T frames, F latent frames, H x W pixels.
"""

from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fw_train.camera_files import read_cameras
from fw_train.geometry import (
    Cameras,
    decode_pose9,
    divide_translation,
    encode_pose9,
    intrinsics_px,
    invert_rigid,
    pack_plucker,
    plucker_rays,
    relative_to_first,
    rigid,
    rotation_angle_deg,
    vertical_fov_rad,
)

Motion = Literal["orbit", "dolly", "pan"]
MOTIONS: tuple[Motion, ...] = get_args(Motion)
FOV_RAD = 0.1, 3.0  # a prediction may be any number; camera files take no wider range


class Trajectory(NamedTuple):
    """The cameras of a clip, in fp64."""

    first_from_cam: Tensor  # [T, 4, 4]
    intrinsics_frac: Tensor  # [T, 4]

    def cameras(self) -> Cameras:
        """The same for files: the first camera's frame is the world."""
        return Cameras(invert_rigid(self.first_from_cam), self.intrinsics_frac)


class PathDistance(NamedTuple):
    rotation_deg: float
    centre: float  # scene scales


class CameraInputs(NamedTuple):
    """A trajectory as networks take it, for a batch of one, fp32."""

    pose9: Tensor  # [1, T, 9], for the pose encoder, whose features also feed the camera adapters
    control_camera: Tensor  # [1, 24, F, H, W], for control-camera networks


def generated_trajectory(
    motion: Motion, amount: float, frames: int, focus: float, intrinsics_frac: Tensor
) -> Trajectory:
    """A motion that is slow at both ends; positive amounts go right and forward.

    `amount` is in radians for orbit and pan, in scene scales for dolly. An orbit keeps looking at what lies `focus` ahead.
    """
    u = torch.linspace(0, 1, frames, dtype=torch.float64)
    way = amount * u * u * (3 - 2 * u)
    still = torch.zeros_like(way)
    turn, right, ahead = {
        "dolly": (still, still, way),
        "pan": (way, still, still),
        "orbit": (-way, focus * way.sin(), focus * (1 - way.cos())),  # from further right one looks back to the left
    }[motion]
    return Trajectory(
        rigid(_turned_right(turn), torch.stack((right, still, ahead), dim=-1)), intrinsics_frac.expand(frames, -1)
    )


def read_trajectory(
    file: Path,
    frames: int,
    size_px: tuple[int, int],
    scene_scale: float,
    original_size: tuple[int, int] | None,
    fallback_frac: Tensor,
) -> Trajectory:
    """The cameras of a file with a row for every frame.

    Translations are divided by `scene_scale`. Fractions refer to frames of `original_size`, cropped about the centre to the
    clip's shape; None: to the clip's own frames. Rows without intrinsics take `fallback_frac`.
    """
    cameras = read_cameras(file, frames, fallback_frac.tolist())
    height, width = size_px
    pixels = intrinsics_px(cameras.intrinsics_frac, height, width, original_size)
    scale = torch.tensor(scene_scale, dtype=torch.float64)
    return Trajectory(
        divide_translation(relative_to_first(cameras.cam_from_world), scale),
        pixels / torch.tensor((width, height, width, height)),
    )


def decoded_trajectory(pose9: Tensor, size_px: tuple[int, int]) -> Trajectory:
    """The cameras that nine numbers [T, 9] stand for."""
    poses, fov_y_rad = decode_pose9(pose9.double())
    return Trajectory(poses, square_pixels(fov_y_rad.clamp(*FOV_RAD), size_px))


def distance_between(a: Trajectory, b: Trajectory) -> PathDistance:
    """How far two paths are apart, each relative to its first camera; means over the frames after that."""
    found, wanted = (relative_path(path)[1:] for path in (a, b))
    turned = rotation_angle_deg(found[:, :3, :3], wanted[:, :3, :3])
    apart = (found[:, :3, 3] - wanted[:, :3, 3]).norm(dim=-1)
    return PathDistance(float(turned.mean()), float(apart.mean()))


def square_pixels(fov_y_rad: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Fractions fp64 [..., 4] of centred cameras with square pixels and vertical fields of view [...]."""
    fy = 0.5 / torch.tan(fov_y_rad.double() / 2)
    half = torch.full_like(fy, 0.5)
    return torch.stack((fy * size_px[0] / size_px[1], fy, half, half), dim=-1)


def relative_path(path: Trajectory) -> Tensor:
    """Poses [T, 4, 4] relative to the path's own first camera, which predictions need not have at the origin."""
    return relative_to_first(invert_rigid(path.first_from_cam))


def camera_inputs(path: Trajectory, size_px: tuple[int, int]) -> CameraInputs:
    pose9 = encode_pose9(path.first_from_cam, vertical_fov_rad(path.intrinsics_frac, 1)).float()
    pixels = intrinsics_px(path.intrinsics_frac, *size_px).float()
    maps = pack_plucker(plucker_rays(path.first_from_cam.float(), pixels, *size_px))
    return CameraInputs(pose9[None], maps[None])


def _turned_right(angle_rad: Tensor) -> Tensor:
    """Rotations [T, 3, 3] of cameras that look so far to the right of the first one's view."""
    cos, sin, zero, one = angle_rad.cos(), angle_rad.sin(), torch.zeros_like(angle_rad), torch.ones_like(angle_rad)
    rows = (cos, zero, sin), (zero, one, zero), (-sin, zero, cos)
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
