"""Camera mathematics: poses, rays, the nine camera numbers, unprojection, and how far two camera paths are apart.

Conventions: cameras look along +z, x points right, y down. `cam_from_world` (w2c) takes world points into the camera;
`first_from_cam` (c2w) takes camera points into the first camera's frame. Pixel centres lie at +0.5.
Intrinsics are fx, fy, cx, cy: as fractions of width and height (`_frac`) or in pixels (`_px`).
Axes: T frames, H x W pixels, `...` any leading axes.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

RE10K_SIZE = (720, 1280)  # height, width of the frames that RealEstate10K's fractions refer to
PACK = 4  # pixel frames whose ray maps share one latent frame
PARALLEL = 1 - 1e-6  # |d.y| beyond this: the axis points along y, and the first camera's x axis measures the roll


class Cameras(NamedTuple):
    """The cameras of a clip, in fp64."""

    cam_from_world: Tensor  # [T, 4, 4]
    intrinsics_frac: Tensor  # [T, 4]


class Similarity(NamedTuple):
    """x -> scale * rotation x + translation."""

    scale: Tensor
    rotation: Tensor  # [3, 3]
    translation: Tensor  # [3]


def invert_rigid(transform: Tensor) -> Tensor:
    """The inverse of rigid transforms [..., 4, 4]."""
    rotation = transform[..., :3, :3].transpose(-1, -2)
    translation = -(rotation @ transform[..., :3, 3:])
    return rigid(rotation, translation.squeeze(-1))


def rigid(rotation: Tensor, translation: Tensor) -> Tensor:
    """Transforms [..., 4, 4] from rotations [..., 3, 3] and translations [..., 3]."""
    top = torch.cat((rotation, translation.unsqueeze(-1)), dim=-1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat((top, bottom), dim=-2)


def relative_to_first(cam_from_world: Tensor) -> Tensor:
    """c2w of each camera in the first one's frame, [..., T, 4, 4]; the first is the identity."""
    return cam_from_world[..., :1, :, :] @ invert_rigid(cam_from_world)


def intrinsics_px(
    intrinsics_frac: Tensor, height: int, width: int, original_size: tuple[int, int] | None = None
) -> Tensor:
    """Pixel intrinsics [..., 4] of frames of the given size.

    `original_size` (height, width) is the frame that the fractions refer to where it had another shape and was cropped about
    its centre to this one, as RE10K_SIZE for RealEstate10K files; None: the fractions refer to these frames themselves.
    """
    fx, fy, cx, cy = intrinsics_frac.unbind(-1)
    if original_size is not None:
        original, shape = original_size[1] / original_size[0], width / height
        if original > shape:
            fx = fx * (original / shape)
        else:
            fy = fy * (shape / original)
    return torch.stack((fx * width, fy * height, cx * width, cy * height), dim=-1)


def vertical_fov_rad(intrinsics: Tensor, height: float) -> Tensor:
    """The vertical field of view [...] of pixel intrinsics [..., 4]; with fractions the height is 1."""
    return 2 * torch.atan(height / (2 * intrinsics[..., 1]))


def crop_resize_intrinsics(
    intrinsics_frac: Tensor, source_size: tuple[int, int], crop: tuple[int, int, int, int]
) -> Tensor:
    """Fractions of a crop (top, left, height, width) of frames of `source_size`; resizing afterwards leaves them as they are."""
    top, left, height, width = crop
    fx, fy, cx, cy = intrinsics_frac.unbind(-1)
    rows, columns = source_size
    return torch.stack(
        (fx * columns / width, fy * rows / height, (cx * columns - left) / width, (cy * rows - top) / height), dim=-1
    )


def mirror_cameras(cameras: Cameras) -> Cameras:
    """The cameras that see the mirrored world (x -> -x) in mirrored frames."""
    flip = torch.diag(torch.tensor([-1.0, 1, 1, 1], dtype=cameras.cam_from_world.dtype))
    fx, fy, cx, cy = cameras.intrinsics_frac.unbind(-1)
    return Cameras(flip @ cameras.cam_from_world @ flip, torch.stack((fx, fy, 1 - cx, cy), dim=-1))


def pixel_directions(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Directions [..., H, W, 3] through the pixel centres in camera coordinates, with z = 1; intrinsics [..., 4] in pixels."""
    fx, fy, cx, cy = (value[..., None, None] for value in intrinsics.unbind(-1))
    v = torch.arange(height, dtype=intrinsics.dtype, device=intrinsics.device)[:, None] + 0.5
    u = torch.arange(width, dtype=intrinsics.dtype, device=intrinsics.device) + 0.5
    x, y = torch.broadcast_tensors((u - cx) / fx, (v - cy) / fy)
    return torch.stack((x, y, torch.ones_like(x)), dim=-1)


def plucker_rays(first_from_cam: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Ray maps [T, H, W, 6]: moment o x d, then the unit direction d, of every pixel's ray in the first camera's frame."""
    directions = pixel_directions(intrinsics, height, width)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    directions = torch.einsum("...ij,...hwj->...hwi", first_from_cam[..., :3, :3], directions)
    origins = first_from_cam[..., None, None, :3, 3].expand_as(directions)
    return torch.cat((torch.linalg.cross(origins, directions), directions), dim=-1)


def pack_plucker(rays: Tensor) -> Tensor:
    """Ray maps [T, H, W, 6] as a control-camera network takes them, [24, F, H, W]: channel c * 4 + k is component c of the
    k-th frame of a group; the first group repeats frame 0, since the VAE encodes that frame alone."""
    frames = rays.shape[0]
    if frames % PACK != 1:
        raise ValueError(
            f"{frames} ray maps are not 4k + 1; cut the clip to {max(1, (frames - 1) // 4 * 4 + 1)} frames"
        )
    padded = torch.cat((repeat(rays[0], "... -> k ...", k=PACK - 1), rays))
    return rearrange(padded, "(f k) h w c -> (c k) f h w", k=PACK)


def unproject(depth: Tensor, intrinsics: Tensor, transform: Tensor) -> Tensor:
    """Points [..., 3, H, W] of z-depth [..., H, W] seen with pixel intrinsics [..., 4], taken on by `transform` [..., 4, 4]."""
    directions = pixel_directions(intrinsics, *depth.shape[-2:])
    return transform_points(transform, rearrange(directions * depth.unsqueeze(-1), "... h w c -> ... c h w"))


def transform_points(transform: Tensor, points: Tensor) -> Tensor:
    """Points [..., 3, H, W] taken on by transforms [..., 4, 4]."""
    turned = torch.einsum("...ij,...jhw->...ihw", transform[..., :3, :3], points)
    return turned + transform[..., :3, 3, None, None]


def scene_scale(points: Tensor, valid: Tensor) -> Tensor:
    """Mean distance of valid points [T, 3, H, W] (in the first camera's frame) to the first camera; valid [T, H, W]."""
    if not valid.any():
        raise ValueError("no valid point to measure the scene by; leave the clip out or check its depth and masks")
    return points.norm(dim=-3)[valid].mean()


def encode_pose9(first_from_cam: Tensor, fov_y_rad: Tensor) -> Tensor:
    """Cameras [..., 4, 4] and vertical fields of view [...] to `[d(3), m(3), s, roll, fov_y]`, [..., 9].

    d is the optical axis, m = c x d its moment about the origin (c the camera's centre), s = c . d. Translations are in units
    of the scene scale. Principal point and pixel aspect are not represented.
    """
    axis, centre = first_from_cam[..., :3, 2], first_from_cam[..., :3, 3]
    x0, y0 = _roll_axes(axis)
    x = first_from_cam[..., :3, 0]
    roll = torch.atan2((x * y0).sum(-1), (x * x0).sum(-1))
    roll = torch.where(roll <= -math.pi, roll + 2 * math.pi, roll)
    moment, along = torch.linalg.cross(centre, axis), (centre * axis).sum(-1)
    return torch.cat((axis, moment, torch.stack((along, roll, fov_y_rad), dim=-1)), dim=-1)


def decode_pose9(pose9: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 9] to cameras [..., 4, 4] in the first camera's frame and vertical fields of view [...].

    Any numbers decode to a camera: d is normalised and m made perpendicular to it.
    """
    axis, moment = pose9[..., :3], pose9[..., 3:6]
    axis = axis / axis.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    moment = moment - (moment * axis).sum(-1, keepdim=True) * axis
    along, roll, fov_y_rad = (pose9[..., i] for i in (6, 7, 8))
    centre = torch.linalg.cross(axis, moment) + along.unsqueeze(-1) * axis
    x0, y0 = _roll_axes(axis)
    x = roll.cos().unsqueeze(-1) * x0 + roll.sin().unsqueeze(-1) * y0
    y = torch.linalg.cross(axis, x)
    return rigid(torch.stack((x, y, axis), dim=-1), centre), fov_y_rad


def wrap_angle(angle_rad: Tensor) -> Tensor:
    """The same angle in (-pi, pi]."""
    return -(torch.remainder(-angle_rad + math.pi, 2 * math.pi) - math.pi)


def _roll_axes(axis: Tensor) -> tuple[Tensor, Tensor]:
    """The x and y axes [..., 3] of the camera without roll that looks along `axis`, y being the first camera's down."""
    down, right = torch.zeros_like(axis), torch.zeros_like(axis)
    down[..., 1], right[..., 0] = 1, 1
    across = torch.linalg.cross(down, axis)
    parallel = axis[..., 1:2].abs() > PARALLEL
    # The unused branch is fed a harmless vector: a gradient through normalising zero would be NaN.
    across = torch.where(parallel, right, across)
    x0 = across / across.norm(dim=-1, keepdim=True)
    # Where the axis is only nearly parallel to y, the first camera's x axis is made perpendicular to it.
    x0 = x0 - (x0 * axis).sum(-1, keepdim=True) * axis
    x0 = x0 / x0.norm(dim=-1, keepdim=True)
    return x0, torch.linalg.cross(axis, x0)


def rotation_angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """The angle [...] between rotations [..., 3, 3], exact for small ones too."""
    difference = (a - b).flatten(-2).norm(dim=-1)
    return torch.rad2deg(2 * torch.asin((difference / (2 * math.sqrt(2))).clamp(max=1)))


def direction_angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """The angle [...] between vectors [..., 3]; 0 where both vanish, 90 where one does."""
    lengths = a.norm(dim=-1), b.norm(dim=-1)
    angle = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))
    still = [length < 1e-9 for length in lengths]
    angle = torch.where(still[0] ^ still[1], torch.full_like(angle, math.pi / 2), angle)
    return torch.rad2deg(torch.where(still[0] & still[1], torch.zeros_like(angle), angle))


class PairErrors(NamedTuple):
    """Errors of the relative pose of every pair of frames i < j, [pairs]."""

    rotation_deg: Tensor
    translation_deg: Tensor


def relative_pose_errors(predicted: Tensor, true: Tensor) -> PairErrors:
    """Compares c2w [T, 4, 4] pair by pair; translations by direction, since their scale is free."""
    frames = true.shape[0]
    i, j = torch.triu_indices(frames, frames, offset=1, device=true.device)
    a, b = (invert_rigid(path[i]) @ path[j] for path in (predicted, true))
    return PairErrors(rotation_angle_deg(a[:, :3, :3], b[:, :3, :3]), direction_angle_deg(a[:, :3, 3], b[:, :3, 3]))


def auc_deg(errors: PairErrors, threshold: int = 30) -> Tensor:
    """Mean share of pairs whose larger error is below 1, 2, ... `threshold` degrees: 1 is perfect."""
    worst = torch.maximum(errors.rotation_deg, errors.translation_deg)
    steps = torch.arange(1, threshold + 1, dtype=worst.dtype, device=worst.device)
    return (worst[:, None] < steps).to(worst.dtype).mean()


def align_similarity(source: Tensor, target: Tensor) -> Similarity:
    """The similarity that brings points [N, 3] closest to others in the least-squares sense (Umeyama); never a reflection."""
    mean_s, mean_t = source.mean(dim=0), target.mean(dim=0)
    s, t = source - mean_s, target - mean_t
    u, sigma, vt = torch.linalg.svd(t.T @ s)
    sign = torch.ones_like(sigma)
    sign[2] = torch.linalg.det(u) * torch.linalg.det(vt)
    rotation = u @ torch.diag(sign) @ vt
    spread = s.square().sum()
    scale = (sigma * sign).sum() / spread if spread > 0 else torch.ones_like(spread)
    return Similarity(scale, rotation, mean_t - scale * rotation @ mean_s)


def absolute_trajectory_error(predicted: Tensor, true: Tensor) -> Tensor:
    """Root mean square distance of the camera centres of c2w [T, 4, 4] after the best similarity."""
    centres, target = predicted[:, :3, 3], true[:, :3, 3]
    scale, rotation, translation = align_similarity(centres, target)
    aligned = scale * centres @ rotation.T + translation
    return (aligned - target).square().sum(dim=-1).mean().sqrt()
