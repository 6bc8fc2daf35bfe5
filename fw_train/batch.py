"""Typed batches: what the data path hands to a step, and what the network takes and returns.

Axes: B batch, T pixel frames, F = (T-1)/4 + 1 latent frames, H x W pixels, L text tokens.
Units: depth, points and translations are divided by the scene scale; points are in the first camera's frame.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor

LATENT_CHANNELS = 16
SPATIAL_STRIDE = 8  # pixels per latent pixel
TEMPORAL_STRIDE = 4  # pixel frames per latent frame, the first one alone

DepthKind = Literal["metric", "affine_depth", "affine_disparity"]
DEPTH_KINDS: tuple[DepthKind, ...] = get_args(DepthKind)


class Prediction(NamedTuple):
    """What the network returns, in fp32; `velocity` is None where it was not asked for, the rest where there is no geometry."""

    velocity: Tensor | None  # [B, 16, F, H/8, W/8]
    depth: Tensor | None  # [B, T, H, W], positive
    points: Tensor | None  # [B, T, 3, H, W]
    confidence: Tensor | None  # [B, T, H, W], at least 1; belongs to the points
    cameras: Tensor | None  # [B, T, 9], see geometry.encode_pose9


@dataclass(frozen=True)
class Batch:
    """Samples of one size. Which conditioning fields must be there depends on the Wan variant; the model says which one is missing.

    `latents` are clean as the loader delivers them and noisy (with `timestep` set) as the network takes them.
    """

    latents: Tensor  # [B, 16, F, H/8, W/8]
    text: Tensor  # [B, L, 4096], the UMT5 embedding
    timestep: Tensor | None = None  # fp32 [B], 0..1000
    clip: Tensor | None = None  # [B, 257, 1280]; first-and-last-frame variant [B, 514, 1280]
    image_latents: Tensor | None = (
        None  # [B, 16|20, F, H/8, W/8], first frame, with or without the 4 mask channels in front
    )
    control_latents: Tensor | None = None  # [B, 16, F, H/8, W/8], of the control video
    reference_latents: Tensor | None = None  # [B, 16, H/8, W/8], of the reference image
    control_camera: Tensor | None = None  # [B, 24, F, H, W], packed Plucker maps
    pose9: Tensor | None = None  # [B, T, 9]
    camera_on: Tensor | None = None  # bool [B]; None: every sample is conditioned on its camera
    depth: Tensor | None = None  # [B, T, H, W]
    valid: Tensor | None = None  # bool [B, T, H, W], of depth and points
    points: Tensor | None = None  # [B, T, 3, H, W]
    depth_kind: tuple[DepthKind, ...] = ()  # per sample; empty: metric throughout
    position: Tensor | None = None  # int64 [B], place in the global sample order
    keys: tuple[str, ...] = ()

    @property
    def pixel_frames(self) -> int:
        return pixel_frames(self.latents.shape[2])

    def noised(self, latents: Tensor, timestep: Tensor) -> Self:
        """The network's input at the given noise level."""
        return replace(self, latents=latents, timestep=timestep)

    def drop_camera(self, dropped: Tensor) -> Self:
        """Closes every path by which the camera conditions the network, for the samples that `dropped` [B] names; targets stay."""
        on = torch.ones_like(dropped) if self.camera_on is None else self.camera_on
        control = self.control_camera
        if control is not None:
            control = control.masked_fill(dropped[:, None, None, None, None], 0)
        return replace(self, control_camera=control, camera_on=on & ~dropped)

    def drop_text(self, dropped: Tensor, empty_text: Tensor) -> Self:
        """Replaces the text of the samples that `dropped` [B] names by the embedding of the empty prompt, [L, 4096]."""
        if empty_text.shape != self.text.shape[1:]:
            raise ValueError(
                f"the empty prompt is {tuple(empty_text.shape)}, the texts are {tuple(self.text.shape[1:])}"
            )
        return replace(self, text=torch.where(dropped[:, None, None], empty_text.to(self.text), self.text))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Moves every tensor; `dtype` applies to the network's inputs, while labels, poses and the timestep stay fp32."""
        keep = {"timestep", "pose9", "depth", "points", "position", "valid", "camera_on"}
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device, None if f.name in keep else dtype)
        return replace(self, **moved)


def latent_frames(frames: int) -> int:
    """F for T pixel frames, which must be 4k + 1."""
    if frames < 1 or frames % TEMPORAL_STRIDE != 1:
        near = max(1, round((frames - 1) / TEMPORAL_STRIDE) * TEMPORAL_STRIDE + 1)
        raise ValueError(f"{frames} frames are not 4k + 1, which the VAE's time stride needs; use {near}")
    return (frames - 1) // TEMPORAL_STRIDE + 1


def pixel_frames(latent: int) -> int:
    """T for F latent frames."""
    return (latent - 1) * TEMPORAL_STRIDE + 1
