"""Camera mathematics: poses, rays, the nine camera numbers, unprojection, and how far two camera paths are apart.

Conventions: cameras look along +z, x points right, y down. `cam_from_world` (w2c) takes world points into the camera;
`first_from_cam` (c2w) takes camera points into the first camera's frame. Pixel centres lie at +0.5.
Intrinsics are fx, fy, cx, cy: as fractions of width and height (`_frac`) or in pixels (`_px`).
Axes: T frames, H x W pixels, `...` any leading axes.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

RE10K_SIZE = (720, 1280)  # height, width of the frames that RealEstate10K's fractions refer to
PACK = 4  # pixel frames whose ray maps share one latent frame
PARALLEL = 1 - 1e-6  # |d.y| beyond this: the axis points along y, and the first camera's x axis measures the roll
STILL = 1e-5  # scene scales; a shorter step has no direction, in fp32 it is rounding


class Cameras(NamedTuple):
    """The cameras of a clip, in fp64."""

    cam_from_world: Tensor  # [T, 4, 4]
    intrinsics_frac: Tensor  # [T, 4]


class Similarity(NamedTuple):
    """x -> scale * rotation x + translation."""

    scale: Tensor  # [...]
    rotation: Tensor  # [..., 3, 3]
    translation: Tensor  # [..., 3]


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
    rows, columns = source_size
    if not (0 <= top < top + height <= rows and 0 <= left < left + width <= columns):
        raise ValueError(f"crop (top, left, height, width) {crop} does not lie within the {rows}x{columns} frame")
    fx, fy, cx, cy = intrinsics_frac.unbind(-1)
    return torch.stack(
        (fx * columns / width, fy * rows / height, (cx * columns - left) / width, (cy * rows - top) / height), dim=-1
    )


def mirror_cameras(cameras: Cameras) -> Cameras:
    """The cameras that see the mirrored world (x -> -x) in mirrored frames."""
    flip = cameras.cam_from_world.new_tensor((-1.0, 1, 1, 1))
    fx, fy, cx, cy = cameras.intrinsics_frac.unbind(-1)
    return Cameras(flip[:, None] * cameras.cam_from_world * flip, torch.stack((fx, fy, 1 - cx, cy), dim=-1))


def mirror_points(points: Tensor) -> Tensor:
    """Point maps [..., 3, H, W] of the mirrored world (x -> -x) in mirrored frames."""
    return points.flip(-1) * points.new_tensor((-1.0, 1, 1))[:, None, None]


def pixel_directions(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Directions [..., H, W, 3] through the pixel centres in camera coordinates, with z = 1; intrinsics [..., 4] in pixels."""
    fx, fy, cx, cy = (value[..., None, None] for value in intrinsics.unbind(-1))
    v = torch.arange(height, dtype=intrinsics.dtype, device=intrinsics.device)[:, None] + 0.5
    u = torch.arange(width, dtype=intrinsics.dtype, device=intrinsics.device) + 0.5
    x, y = torch.broadcast_tensors((u - cx) / fx, (v - cy) / fy)
    return torch.stack((x, y, torch.ones_like(x)), dim=-1)


def plucker_rays(first_from_cam: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Ray maps [..., H, W, 6]: moment o x d, then the unit direction d, of every pixel's ray in the first camera's frame."""
    directions = pixel_directions(intrinsics, height, width)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    directions = torch.einsum("...ij,...hwj->...hwi", first_from_cam[..., :3, :3], directions)
    origins = first_from_cam[..., None, None, :3, 3].expand_as(directions)
    return torch.cat((torch.linalg.cross(origins, directions), directions), dim=-1)


def pack_plucker(rays: Tensor) -> Tensor:
    """Ray maps [..., T, H, W, 6] as a control-camera network takes them, [..., 24, F, H, W]: channel c * 4 + k is component c of
    the k-th frame of a group; the first group repeats frame 0, since the VAE encodes that frame alone."""
    frames = rays.shape[-4]
    if frames % PACK != 1:
        raise ValueError(
            f"{frames} ray maps are not 4k + 1; cut the clip to {max(1, (frames - 1) // 4 * 4 + 1)} frames"
        )
    padded = torch.cat((rays[..., :1, :, :, :],) * (PACK - 1) + (rays,), dim=-4)
    return rearrange(padded, "... (f k) h w c -> ... (c k) f h w", k=PACK)


def unproject(depth: Tensor, intrinsics: Tensor, transform: Tensor) -> Tensor:
    """Points [..., 3, H, W] of z-depth [..., H, W] seen with pixel intrinsics [..., 4], taken on by `transform` [..., 4, 4]."""
    directions = pixel_directions(intrinsics, *depth.shape[-2:])
    return transform_points(transform, rearrange(directions * depth.unsqueeze(-1), "... h w c -> ... c h w"))


def transform_points(transform: Tensor, points: Tensor) -> Tensor:
    """Points [..., 3, H, W] taken on by transforms [..., 4, 4]."""
    turned = torch.einsum("...ij,...jhw->...ihw", transform[..., :3, :3], points)
    return turned + transform[..., :3, 3, None, None]


def points_in_first_camera(world_points: Tensor, cam_from_world: Tensor) -> Tensor:
    """World points [..., T, 3, H, W] in the frame of the first of the cameras [..., T, 4, 4]."""
    return transform_points(cam_from_world[..., :1, :, :].to(world_points), world_points)


def scene_scale(points: Tensor, valid: Tensor) -> Tensor:
    """Mean distance [...] of valid points [..., T, 3, H, W], in the first camera's frame, to that camera; valid [..., T, H, W]."""
    distance = torch.where(valid, points.norm(dim=-3), 0).sum(dim=(-3, -2, -1))
    count = valid.sum(dim=(-3, -2, -1))
    if not count.all():
        raise ValueError("no valid point to measure the scene by; leave the clip out or check its depth and masks")
    scale = distance / count
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            f"scene scale {scale.tolist()} over {count.tolist()} valid points cannot be divided by; mark points that are not "
            "finite as invalid, and check that the others are not all at the first camera"
        )
    return scale


def divide_translation(transform: Tensor, scale: Tensor) -> Tensor:
    """Transforms [..., T, 4, 4] with translations in units of the scene scale [...]."""
    return rigid(transform[..., :3, :3], transform[..., :3, 3] / scale[..., None, None])


def encode_pose9(first_from_cam: Tensor, fov_y_rad: Tensor) -> Tensor:
    """Cameras [..., 4, 4] and vertical fields of view [...] to `[d(3), m(3), s, roll, fov_y]`, [..., 9].

    d is the optical axis, m = c x d its moment about the origin (c the camera's centre), s = c . d. Translations are in units
    of the scene scale. Principal point and pixel aspect are not represented.
    """
    axis, centre = _unit(first_from_cam[..., :3, 2]), first_from_cam[..., :3, 3]
    # Normalised once more, to the bits that decoding sees: both must take the same side of PARALLEL.
    x0, y0 = _roll_axes(_unit(axis))
    x = first_from_cam[..., :3, 0]
    roll = wrap_angle(torch.atan2((x * y0).sum(-1), (x * x0).sum(-1)))
    moment, along = torch.linalg.cross(centre, axis), (centre * axis).sum(-1)
    return torch.cat((axis, moment, torch.stack((along, roll, fov_y_rad), dim=-1)), dim=-1)


def decode_pose9(pose9: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 9] to cameras [..., 4, 4] in the first camera's frame and vertical fields of view [...].

    Any numbers decode to a camera, d being normalised and m made perpendicular to it; only d = 0, no direction, gives NaN.
    """
    axis, moment = _unit(pose9[..., :3]), pose9[..., 3:6]
    along, roll, fov_y_rad = (pose9[..., i] for i in (6, 7, 8))
    # d x m takes only the part of m that is perpendicular to d.
    centre = torch.linalg.cross(axis, moment) + along.unsqueeze(-1) * axis
    x0, y0 = _roll_axes(axis)
    x = roll.cos().unsqueeze(-1) * x0 + roll.sin().unsqueeze(-1) * y0
    y = torch.linalg.cross(axis, x)
    return rigid(torch.stack((x, y, axis), dim=-1), centre), fov_y_rad


def wrap_angle(angle_rad: Tensor) -> Tensor:
    """The same angle in (-pi, pi]; angles that lie there keep every bit."""
    wrapped = angle_rad - 2 * math.pi * torch.round(angle_rad / (2 * math.pi))
    return torch.where(wrapped <= -math.pi, wrapped + 2 * math.pi, wrapped)


def _roll_axes(axis: Tensor) -> tuple[Tensor, Tensor]:
    """The x and y axes [..., 3] of the camera without roll that looks along `axis`, y being the first camera's down."""
    x, y, z = axis.unbind(-1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    across = torch.stack((z, zero, -x), dim=-1)  # y x d
    right = torch.stack((one, zero, zero), dim=-1)
    # Chosen before it is normalised: a gradient through normalising zero would be NaN.
    x0 = torch.where((y.abs() > PARALLEL).unsqueeze(-1), right, across)
    # Where the axis is only nearly parallel to y, the first camera's x axis is made perpendicular to it.
    x0 = _unit(x0 - (x0 * axis).sum(-1, keepdim=True) * axis)
    return x0, torch.linalg.cross(axis, x0)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-1, keepdim=True)


def rotation_angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """The angle [...] between rotations [..., 3, 3], exact near 0 and 180 degrees too."""
    r = a.mT @ b
    twice_sin = torch.stack(
        (r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]), dim=-1
    )
    twice_cos = r.diagonal(dim1=-2, dim2=-1).sum(-1) - 1
    return torch.rad2deg(torch.atan2(twice_sin.norm(dim=-1), twice_cos))


def direction_angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """The angle [...] between vectors [..., 3]; 0 where both are STILL, 90 where one is."""
    angle = torch.rad2deg(torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1)))
    a_still, b_still = a.norm(dim=-1) < STILL, b.norm(dim=-1) < STILL
    return torch.where(a_still & b_still, 0, torch.where(a_still | b_still, 90, angle))


class PairErrors(NamedTuple):
    """Errors of the relative pose of every pair of frames i < j, [..., pairs]."""

    rotation_deg: Tensor
    translation_deg: Tensor


def relative_pose_errors(predicted: Tensor, true: Tensor) -> PairErrors:
    """Compares c2w [..., T, 4, 4] pair by pair, in units of the scene scale; translations by direction alone."""
    frames = true.shape[-3]
    if frames < 2:
        raise ValueError(f"{frames} frames make no pair to compare; give at least 2")
    i, j = torch.triu_indices(frames, frames, offset=1, device=true.device)
    a, b = (invert_rigid(path[..., i, :, :]) @ path[..., j, :, :] for path in (predicted, true))
    return PairErrors(
        rotation_angle_deg(a[..., :3, :3], b[..., :3, :3]), direction_angle_deg(a[..., :3, 3], b[..., :3, 3])
    )


def auc_deg(errors: PairErrors, threshold: int = 30) -> Tensor:
    """Mean share [...] of pairs whose larger error is below 1, 2, ... `threshold` degrees: 1 is perfect."""
    worst = torch.maximum(errors.rotation_deg, errors.translation_deg)
    steps = torch.arange(1, threshold + 1, dtype=worst.dtype, device=worst.device)
    return (worst[..., None] < steps).to(worst.dtype).mean(dim=(-2, -1))


def align_similarity(source: Tensor, target: Tensor) -> Similarity:
    """The similarity that brings points [..., N, 3] closest to others in the least-squares sense (Umeyama); never a reflection."""
    mean_s, mean_t = source.mean(dim=-2, keepdim=True), target.mean(dim=-2, keepdim=True)
    s, t = source - mean_s, target - mean_t
    u, sigma, vt = torch.linalg.svd(t.mT @ s)
    proper = (torch.linalg.det(u) * torch.linalg.det(vt)).sign()
    sign = torch.stack((torch.ones_like(proper), torch.ones_like(proper), proper), dim=-1)
    rotation = u @ (sign.unsqueeze(-1) * vt)
    spread = s.square().sum(dim=(-2, -1))
    # A source that is a single point fits equally well at any scale.
    scale = torch.where(spread > 0, (sigma * sign).sum(-1) / spread, 1)
    translation = mean_t - scale[..., None, None] * (mean_s @ rotation.mT)
    return Similarity(scale, rotation, translation.squeeze(-2))


def absolute_trajectory_error(predicted: Tensor, true: Tensor) -> Tensor:
    """Root mean square distance [...] of the camera centres of c2w [..., T, 4, 4] after the best similarity, in units of `true`."""
    centres, target = predicted[..., :3, 3], true[..., :3, 3]
    scale, rotation, translation = align_similarity(centres, target)
    aligned = scale[..., None, None] * (centres @ rotation.mT) + translation.unsqueeze(-2)
    return (aligned - target).square().sum(dim=-1).mean(dim=-1).sqrt()
