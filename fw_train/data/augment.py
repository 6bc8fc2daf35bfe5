"""How a sample is seen: which frames, which window, mirrored or not, in which colours; drawn from (seed, position) alone.

Nothing is drawn where an augmentation is off: the first frames, the middle of the picture, its own colours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from fw_train.data.schema import Bucket
from fw_train.data.transform import CropResize, cover_crop

_LUMA = 0.299, 0.587, 0.114


@dataclass(frozen=True)
class Augmentation:
    """What may change from pass to pass. Flips are off by default: captions say left and right."""

    random_crop: bool = False  # the window lies anywhere in the frame
    max_temporal_stride: int = 1  # above 1: every s-th frame, s drawn up to this, from any first frame
    flip: float = 0.0  # probability
    colour_jitter: float = 0.0  # largest relative change of brightness, contrast and saturation; of the video alone

    def __post_init__(self) -> None:
        if self.max_temporal_stride < 1 or not 0 <= self.flip <= 1 or not 0 <= self.colour_jitter < 1:
            raise ValueError(
                f"max_temporal_stride {self.max_temporal_stride} must be at least 1, flip {self.flip} a probability and "
                f"colour_jitter {self.colour_jitter} from 0 to below 1"
            )

    @property
    def changes(self) -> tuple[str, ...]:
        """Names of the augmentations that are on."""
        on = {
            "random_crop": self.random_crop,
            "max_temporal_stride": self.max_temporal_stride > 1,
            "flip": self.flip > 0,
            "colour_jitter": self.colour_jitter > 0,
        }
        return tuple(name for name, is_on in on.items() if is_on)


class View(NamedTuple):
    """How one sample is seen."""

    frames: tuple[int, ...]
    crop: CropResize
    flipped: bool
    colours: Tensor | None  # float32 [3, 4]: red, green, blue in [-1, 1] and 1 to new ones; None leaves them


def draw_view(
    bucket: Bucket, frames: int, to: tuple[int, int], augmentation: Augmentation, seed: int, position: int
) -> View:
    """The view of the sample at a position; each draw has its own place, so that switching one on leaves the others."""
    draws = _uniform(seed, position)
    stride_draw, start_draw, down_draw, right_draw, flip_draw, *colour_draws = (next(draws) for _ in range(8))
    largest = min(augmentation.max_temporal_stride, (bucket.frames - 1) // max(1, frames - 1))
    stride = 1 + int(stride_draw * largest)
    free = bucket.frames - (frames - 1) * stride if augmentation.max_temporal_stride > 1 else 1
    start = int(start_draw * free)
    crop = cover_crop(bucket.height, bucket.width, *to)
    if augmentation.random_crop:
        down, right = crop.slack
        crop = crop.moved(int(down_draw * (down + 1)), int(right_draw * (right + 1)))
    chosen = tuple(range(start, start + (frames - 1) * stride + 1, stride))
    colours = _recolour(augmentation.colour_jitter, colour_draws) if augmentation.colour_jitter else None
    return View(chosen, crop, flip_draw < augmentation.flip, colours)


def _recolour(most: float, draws: list[float]) -> Tensor:
    """[3, 4] that changes brightness, contrast about the middle grey, and saturation."""
    brightness, contrast, saturation = (1 + most * (2 * draw - 1) for draw in draws)
    grey = torch.tensor(_LUMA).expand(3, 3)
    mixed = saturation * torch.eye(3) + (1 - saturation) * grey
    # Black is -1, so brightness scales about it.
    return torch.cat((contrast * brightness * mixed, torch.full((3, 1), contrast * (brightness - 1))), dim=1)


def _uniform(seed: int, position: int) -> Iterator[float]:
    """Endless numbers in [0, 1)."""
    number = 0
    while True:
        digest = blake2b(f"{seed}/view/{position}/{number}".encode(), digest_size=64).digest()
        yield from ((int.from_bytes(digest[at : at + 8], "little") >> 11) / 2**53 for at in range(0, 64, 8))
        number += 1
