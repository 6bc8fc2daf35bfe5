"""Video to latents and back: what a codec is, and which ones there are.

Axes: B batch, T = 4k + 1 pixel frames, F = k + 1 latent frames, H x W pixels.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fw_train.encoders.dct import DctCodec
from fw_train.encoders.wan_vae import load_wan_vae


class LatentCodec(Protocol):
    """Causal in time: latent frame f depends on the first 4f + 1 pixel frames alone. No autograd."""

    fingerprint_facts: dict[str, Any]  # what decides the numbers: name, hash of the weights, ...

    def encode(self, video: Tensor) -> Tensor:
        """fp32 [B, 3, T, H, W] in [-1, 1] to fp32 [B, 16, F, H/8, W/8] of about unit variance."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Undoes `encode` as well as it can, within [-1, 1]."""
        ...


def load_latent_codec(name_or_folder: str | Path, device: str | torch.device = "cpu") -> LatentCodec:
    """`dct`, or Wan's VAE: a folder in the layout of the original or of diffusers."""
    if str(name_or_folder) == "dct":
        return DctCodec(device)
    return load_wan_vae(name_or_folder, device)


def first_frame_video(frame: Tensor, frames: int) -> Tensor:
    """What Wan's image-to-video network is conditioned on, before encoding: the frame [B, 3, H, W], then zeros."""
    video = frame.new_zeros(*frame.shape[:2], frames, *frame.shape[2:])
    video[:, :, 0] = frame
    return video
