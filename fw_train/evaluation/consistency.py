"""Whether depth of one frame, moved by the cameras, meets the depth of another; one clip at a time.

A pixel of frame t is unprojected with its depth and camera, projected into frame t', and its depth there compared with what
stands in that frame's depth map. Only pixels are asked whose counterpart is visible in truth: true depth and true cameras
agree there, so that nothing has come in front, moved, or left the picture.

Axes: T frames, P pairs of frames, H x W pixels. Pixels are square and the principal point is the centre: the nine camera
numbers say no more. Inverse depth is interpolated between pixels, because on a plane it is linear in the picture.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from fw_train.geometry import invert_rigid, unproject

PAIRED = 4  # frames are paired with those a quarter of the clip later
VISIBLE = 0.05  # relative difference of true depths below which a pixel sees the same surface
FOV_DEG = (1.0, 179.0)  # of a prediction; beyond, a pinhole has no picture


class View(NamedTuple):
    """Depth maps and their cameras."""

    depth: Tensor  # [T, H, W]
    first_from_cam: Tensor  # [T, 4, 4]
    fov_y_rad: Tensor  # [T]


class Reprojection(NamedTuple):
    """fp64 scalars."""

    error: Tensor  # mean of |z - d| / max(z, d): z the projected depth, d the depth found there; below 1
    coverage: Tensor  # share of the visible pixels that land in the other picture, where alone there is an error


class Landing(NamedTuple):
    """Where the pixels of one frame come to lie in another."""

    difference: Tensor  # fp64 [H, W], relative; NaN where a depth is missing
    inside: Tensor  # bool [H, W], in front of the camera and in its picture


def frame_pairs(frames: int) -> list[tuple[int, int]]:
    """Pairs (t, t') of frame numbers."""
    step = max(1, (frames - 1) // PAIRED)
    return [(t, t + step) for t in range(frames - step)]


def visible_pixels(view: View, valid: Tensor) -> Tensor:
    """bool [P, H, W]: pixels of the first frame of each pair that the second one sees too, from the truth and its validity."""
    known = view._replace(depth=torch.where(valid, view.depth.double(), math.nan))
    landings = [land(known, t, other) for t, other in frame_pairs(len(valid))]
    return torch.stack([landing.inside & (landing.difference < VISIBLE) for landing in landings])


def reprojection(view: View, visible: Tensor) -> Reprojection:
    """The disagreement of a view with itself at `visible` [P, H, W]; NaN where nothing is, or lands in the other picture."""
    total = asked = landed = torch.zeros((), dtype=torch.float64, device=visible.device)
    for (t, other), seen in zip(frame_pairs(len(view.depth)), visible, strict=True):
        difference, inside = land(view, t, other)
        total = total + difference[seen & inside].sum()
        asked, landed = asked + seen.sum(), landed + (seen & inside).sum()
    return Reprojection(total / landed, landed / asked)


def land(view: View, t: int, other: int) -> Landing:
    """Frame t projected into the frame `other`."""
    height, width = view.depth.shape[-2:]
    depth, poses = view.depth.double(), view.first_from_cam.double()
    intrinsics = square_intrinsics_px(view.fov_y_rad.double(), height, width)
    points = unproject(depth[t], intrinsics[t], invert_rigid(poses[other]) @ poses[t])
    z = points[2]
    fx, fy, cx, cy = intrinsics[other]
    u, v = fx * points[0] / z + cx, fy * points[1] / z + cy
    half = 0.5 - 1e-6  # between the centres of the pixels at the edges, which rounding may miss
    inside = (z > 0) & (u >= half) & (u <= width - half) & (v >= half) & (v <= height - half)
    grid = torch.stack((2 * u / width - 1, 2 * v / height - 1), dim=-1)
    inverse = 1 / depth[other]
    found = grid_sample(inverse[None, None], grid[None], padding_mode="border", align_corners=False)[0, 0]
    # |z - d| / max(z, d) with d = 1 / found
    ratio = z * found
    return Landing((ratio - 1).abs() / torch.maximum(ratio, torch.ones_like(ratio)), inside)


def square_intrinsics_px(fov_y_rad: Tensor, height: int, width: int) -> Tensor:
    """Pixel intrinsics [..., 4] of square pixels about the centre, from the vertical field of view [...]."""
    low, high = (math.radians(angle) for angle in FOV_DEG)
    focal = height / (2 * torch.tan(fov_y_rad.clamp(low, high) / 2))
    return torch.stack((focal, focal, torch.full_like(focal, width / 2), torch.full_like(focal, height / 2)), dim=-1)
