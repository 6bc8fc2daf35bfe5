"""First frames to the features that image-to-video networks attend to."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class ImageEncoder(Protocol):
    fingerprint_facts: dict[str, Any]  # what decides the numbers

    def encode(self, frames: Tensor) -> Tensor:
        """fp32 [B, 3, H, W] in [-1, 1] to [B, 257, 1280]; no autograd."""
        ...


def load_image_encoder(folder: str | Path, device: str | torch.device = "cpu") -> ImageEncoder:
    """The CLIP of a Wan folder."""
    raise ValueError(f"{folder} has no image encoder")
