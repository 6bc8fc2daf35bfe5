"""From coded batches to what a step trains on, on the device: labels decoded, scaled by the scene, cameras as nine numbers.

    batch = expand_batch(coded, device, torch.bfloat16)
    video = expand_video(coded, device)                      # where the loader was asked for it
    batch = expand_batch(coded, device, torch.bfloat16, latents=encode(video))

The scene scale is the mean distance of the valid points of what is seen, so after choosing frames and cropping, to the first
camera of what is seen; depth, points and translations of a sample are divided by this one number. Where a window has no valid
point, nothing but the cameras is trained on, and these take the scale of the packed clip.

Axes: B batch, T frames, H x W pixels, F latent frames, L text tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fw_train.batch import Batch
from fw_train.data.augment import View
from fw_train.data.codec_torch import expand
from fw_train.data.coded import CodedBatch
from fw_train.data.samples import CodedLabels
from fw_train.data.transform import crop_resize_labels, resize_video
from fw_train.data.video import VideoFrames, to_rgb
from fw_train.geometry import (
    divide_translation,
    encode_pose9,
    intrinsics_px,
    mirror_points,
    pack_plucker,
    plucker_rays,
    relative_to_first,
    transform_points,
    vertical_fov_rad,
)

SMALLEST_SCALE = 1e-6  # as in packing


class SceneLabels(NamedTuple):
    """The labels of one sample in units of its scene."""

    depth: Tensor  # [T, H, W], 0 where not valid, as are points
    valid: Tensor  # bool [T, H, W]
    points: Tensor  # [T, 3, H, W], in the first camera's frame
    first_from_cam: Tensor  # fp64 [T, 4, 4]
    intrinsics_frac: Tensor  # fp64 [T, 4]


def expand_batch(
    coded: CodedBatch,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    control_camera: bool = False,
    latents: Tensor | None = None,
) -> Batch:
    """The batch on the device; network inputs in `dtype`, labels and poses in fp32.

    `latents` [B, 16, F, h, w] are given where they are encoded online.
    """
    device = torch.device(device)
    encoded = {
        kind: torch.stack([_encoded(sample.encoded[kind], kind, coded, device).to(dtype) for sample in coded.samples])
        for kind in coded.samples[0].encoded
    }
    latents = encoded.get("latent") if latents is None else latents.to(device, dtype)
    if latents is None or "text" not in encoded:
        raise ValueError("a batch needs latents and text; read both from sidecars, or give the latents encoded online")
    labels = [
        expand_labels(sample.labels, sample.view, sample.scene_scale, device)
        for sample in coded.samples
        if sample.labels is not None
    ]
    seen = SceneLabels(*map(torch.stack, zip(*labels, strict=True))) if labels else None
    if control_camera and seen is None:
        raise ValueError("the camera's ray maps need cameras; ask the loader for labels")
    return Batch(
        latents,
        encoded["text"],
        clip=encoded.get("clip"),
        image_latents=encoded.get("image"),
        control_camera=_ray_maps(seen).to(dtype) if seen is not None and control_camera else None,
        pose9=None if seen is None else _pose9(seen),
        depth=None if seen is None else seen.depth,
        valid=None if seen is None else seen.valid,
        points=None if seen is None else seen.points,
        depth_kind=tuple(sample.depth_kind for sample in coded.samples),
        position=coded.position.to(device, non_blocking=True),
        keys=coded.keys,
    )


def expand_video(coded: CodedBatch, device: torch.device | str) -> Tensor:
    """The frames, float32 [B, T, 3, H, W] in [-1, 1]: scaled, mirrored and recoloured as their labels are."""
    pictures = []
    for sample in coded.samples:
        if sample.video is None:
            raise ValueError("there is no video in this batch; ask the loader for it")
        video = VideoFrames(*(planes.to(device, non_blocking=True) for planes in sample.video))
        if sample.view.colours is not None:  # one matrix for both: nothing is clamped in between
            video = video._replace(rgb_from_yuv=_after(sample.view.colours.to(device), video.rgb_from_yuv))
        rgb = resize_video(to_rgb(video), sample.view.crop)
        pictures.append(rgb.flip(-1) if sample.view.flipped else rgb)
    return torch.stack(pictures)


def expand_labels(labels: CodedLabels, view: View, packed_scale: float, device: torch.device | str) -> SceneLabels:
    """The labels of one sample."""
    device = torch.device(device)
    (depth, depth_valid), (points, points_valid) = (expand(codes, device) for codes in labels[:2])
    valid = crop_resize_labels(depth_valid & points_valid, view.crop)
    depth, points = crop_resize_labels(depth, view.crop), crop_resize_labels(points, view.crop)
    if view.flipped:
        depth, valid, points = depth.flip(-1), valid.flip(-1), mirror_points(points)
    if view.frames[0] != 0:
        points = transform_points(labels.first_from_packed.to(points), points)
    # Pixels that are not valid may hold anything in lossless frames, NaN too.
    depth, points = torch.where(valid, depth, 0), torch.where(valid[:, None], points, 0)
    scale = _scene_scale(points, valid, packed_scale)
    cam_from_world, intrinsics_frac = (tensor.to(device, non_blocking=True) for tensor in labels.cameras)
    path = divide_translation(relative_to_first(cam_from_world), scale)
    return SceneLabels(depth / scale.float(), valid, points / scale.float(), path, intrinsics_frac)


def _scene_scale(points: Tensor, valid: Tensor, packed_scale: float) -> Tensor:
    """fp64 []; as `geometry.scene_scale`, but waits for no device and has an answer where nothing is valid."""
    distance = torch.where(valid, points.norm(dim=1), 0).sum(dtype=torch.float64)
    scale = distance / valid.sum().clamp(min=1)
    return torch.where(scale > SMALLEST_SCALE, scale, packed_scale)


def _encoded(tensor: Tensor, kind: str, coded: CodedBatch, device: torch.device) -> Tensor:
    moved = tensor.to(device, non_blocking=True)
    return pad_text(moved, coded.text_tokens) if kind == "text" else moved


def pad_text(text: Tensor, tokens: int) -> Tensor:
    """A text embedding [n, D] with zeros behind it, [L, D]."""
    if len(text) > tokens:
        raise ValueError(f"a text has {len(text)} tokens, data.text_tokens is {tokens}; raise that")
    return pad(text, (0, 0, 0, tokens - len(text)))


def _pose9(seen: SceneLabels) -> Tensor:
    """[B, T, 9]"""
    return encode_pose9(seen.first_from_cam, vertical_fov_rad(seen.intrinsics_frac, 1)).float()


def _ray_maps(seen: SceneLabels) -> Tensor:
    """[B, 24, F, H, W]"""
    height, width = seen.depth.shape[-2:]
    # Poses are relative to the first camera by now: fp32 is enough, and half the memory.
    pixels = intrinsics_px(seen.intrinsics_frac, height, width).float()
    return pack_plucker(plucker_rays(seen.first_from_cam.float(), pixels, height, width))


def _after(colours: Tensor, rgb_from_yuv: Tensor) -> Tensor:
    """[3, 4]: `rgb_from_yuv`, then `colours`."""
    mixed = colours[:, :3] @ rgb_from_yuv
    mixed[:, 3] += colours[:, 3]
    return mixed
