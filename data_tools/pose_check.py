"""Whether depth and cameras tell of the same scene, which poses of another convention do not.

Every frame's depth, taken to the first frame by the cameras, is compared with the depth there. Rotations stay rotations when a pose
is inverted or its axes are others, so nothing else can tell. Axes: N frames, H x W pixels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fw_train.geometry import invert_rigid, relative_to_first, unproject

LOOKED_AT, LOOKED_AT_PX = 5, 128  # frames, and pixels of their longer side
LEAST_SEEN = 0.1  # of the pixels must land in the first frame for a comparison
NOTICED = 0.02  # relative error of the depth from which another explanation is sought
CLEARLY = 3.0  # times smaller is the error with the right one
DOUBTFUL = 0.15  # relative error that good depth and cameras do not have
SCALES = [2 ** (step / 2) for step in range(-20, 21)]  # of depth against cameras
OPENGL = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))  # its axes from ours


class PoseCheck(NamedTuple):
    error: float  # median relative difference of depths; NaN where frames do not overlap
    better: str  # the convention that the poses seem to have; empty if they are as they should be
    better_error: float
    scale: float  # of the depth with which it fits clearly better; else 1


def check_poses(depth: Tensor, intrinsics_px: Tensor, cam_from_world: Tensor) -> PoseCheck:
    """Compares depth [N, H, W], NaN where it is invalid, by cameras [N, 4] and [N, 4, 4]."""
    error = depth_error(depth, intrinsics_px, cam_from_world)
    if not error > NOTICED:
        return PoseCheck(error, "", error, 1.0)
    inverse = invert_rigid(cam_from_world)
    others = {
        "inverted (camera to world where world to camera belongs, or the reverse)": inverse,
        "in other axes (OpenGL's y up, z backwards where OpenCV's y down, z forwards belong, or the reverse)": OPENGL
        @ cam_from_world,
        "inverted and in other axes": OPENGL @ inverse,
    }
    found = {name: depth_error(depth, intrinsics_px, poses) for name, poses in others.items()}
    name = min(found, key=lambda name: found[name] if math.isfinite(found[name]) else math.inf)
    if found[name] * CLEARLY < error:
        return PoseCheck(error, name, found[name], 1.0)
    scaled = {scale: depth_error(scale * depth, intrinsics_px, cam_from_world) for scale in SCALES}
    scale = min(scaled, key=lambda scale: scaled[scale] if math.isfinite(scaled[scale]) else math.inf)
    return PoseCheck(error, "", error, scale if scaled[scale] * CLEARLY < error else 1.0)


def depth_error(depth: Tensor, intrinsics_px: Tensor, cam_from_world: Tensor) -> float:
    """The median of |log(depth seen from a later frame / depth of the first frame)|; NaN if too few pixels land there."""
    first_from_cam = relative_to_first(cam_from_world)
    height, width = depth.shape[-2:]
    fx, fy, cx, cy = intrinsics_px[0]
    ratios = []
    for t in range(1, len(depth)):
        x, y, z = unproject(depth[t], intrinsics_px[t], first_from_cam[t])
        seen = z > 0
        column, row = (fx * x / z + cx).floor(), (fy * y / z + cy).floor()
        seen &= (column >= 0) & (column < width) & (row >= 0) & (row < height)
        there = depth[0][row[seen].long(), column[seen].long()]
        known = there.isfinite()
        if known.sum() >= LEAST_SEEN * depth[t].isfinite().sum() > 0:
            ratios.append((z[seen][known] / there[known]).log().abs())
    return float(torch.cat(ratios).median()) if ratios else float("nan")
