"""A latent codec without weights: 16 coefficients of a cosine transform, in the shape of Wan's latents.

The first frame alone, then every four frames are cut into blocks of 8x8 pixels. Of a block's orthonormal transform over colour,
time and space the 16 coefficients are kept that hold most of the energy of synthetic scenes, 96 % in first frames and 95 % in
later ones. It is for demos and tests: nothing is learnt, nothing is downloaded, and decoding gives a video one can look at.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

BLOCK, GROUP = 8, 4  # pixels, frames
CHUNK = 4  # groups that are transformed at once

# Orthonormal colour axes: light, red against blue, green against the others.
_COLOURS = ((1, 1, 1), (1, 0, -1), (-1, 2, -1))


class Channel(NamedTuple):
    """A coefficient: colour axis, then frequency in time, height and width; `mean` and `deviation` normalise it."""

    colour: int
    time: int
    height: int
    width: int
    mean: float
    deviation: float


# Measured on `fw data synth raw --scenes 24 --frames 17 --size 128x192`. Four like frames double a coefficient.
_SHARED = (
    Channel(0, 0, 0, 0, 5.2, 7.9),
    Channel(1, 0, 0, 0, 1.0, 3.6),
    Channel(2, 0, 0, 0, 0.0, 2.1),
    Channel(0, 0, 1, 0, 0.0, 2.0),
    Channel(0, 0, 0, 1, 0.0, 1.35),
    Channel(0, 0, 2, 0, 0.0, 1.0),
    Channel(0, 0, 1, 1, 0.0, 0.7),
    Channel(0, 0, 0, 2, 0.0, 0.6),
    Channel(0, 0, 3, 0, 0.0, 0.6),
    Channel(1, 0, 1, 0, 0.0, 0.65),
    Channel(1, 0, 0, 1, 0.0, 0.6),
)
_LATER = (
    *_SHARED,
    Channel(0, 1, 0, 0, 0.0, 1.4),
    Channel(0, 1, 1, 0, 0.0, 0.8),
    Channel(0, 1, 0, 1, 0.0, 0.62),
    Channel(0, 1, 2, 0, 0.0, 0.55),
    Channel(1, 1, 0, 0, 0.0, 0.55),
)
_FIRST = (
    *(channel._replace(mean=channel.mean / 2, deviation=channel.deviation / 2) for channel in _SHARED),
    Channel(0, 0, 2, 1, 0.0, 0.3),
    Channel(0, 0, 4, 0, 0.0, 0.27),
    Channel(0, 0, 0, 3, 0.0, 0.26),
    Channel(0, 0, 1, 2, 0.0, 0.25),
    Channel(0, 0, 3, 1, 0.0, 0.22),
)


class Transform(NamedTuple):
    """Orthonormal rows [16, 3 * t * 8 * 8] of blocks of t frames, and what normalises their products [16]."""

    basis: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, channels: tuple[Channel, ...], frames: int, device: str | torch.device) -> "Transform":
        basis = torch.stack([_row(channel, frames) for channel in channels])
        mean, deviation = (torch.tensor([c[at] for c in channels], dtype=torch.float64) for at in (4, 5))
        return cls(*(part.float().to(device) for part in (basis, mean, deviation)))


class DctCodec:
    """See `LatentCodec`."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.fingerprint_facts: dict[str, Any] = {"codec": "dct", "version": 1}
        self._first, self._later = Transform.of(_FIRST, 1, device), Transform.of(_LATER, GROUP, device)
        self._device = device

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """fp32 [B, 3, T, H, W] in [-1, 1] to fp32 [B, 16, F, H/8, W/8]."""
        batch, _, frames, height, width = video.shape
        if frames % GROUP != 1 or height % BLOCK or width % BLOCK:
            raise ValueError(
                f"{frames} frames of {height}x{width}; 4k + 1 frames and sides in multiples of {BLOCK} are needed"
            )
        latents = video.new_empty(batch, 16, 1 + frames // GROUP, height // BLOCK, width // BLOCK, device=self._device)
        for at, transform, here in self._chunks(latents.shape[2]):
            start = GROUP * at - GROUP + 1 if at else 0
            count = GROUP * here if at else 1
            frames_in = GROUP if at else 1
            part = video[:, :, start : start + count].to(self._device)
            blocks = rearrange(part, "b c (f t) (h y) (w x) -> b f h w (c t y x)", t=frames_in, y=BLOCK, x=BLOCK)
            found = (blocks @ transform.basis.T - transform.mean) / transform.deviation
            latents[:, :, at : at + here] = rearrange(found, "b f h w c -> b c f h w")
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """fp32 [B, 16, F, H/8, W/8] to fp32 [B, 3, T, H, W] in [-1, 1]."""
        parts = []
        for at, transform, here in self._chunks(latents.shape[2]):
            part = rearrange(latents[:, :, at : at + here].to(self._device), "b c f h w -> b f h w c")
            blocks = (part.float() * transform.deviation + transform.mean) @ transform.basis
            frames_in = GROUP if at else 1
            pattern = "b f h w (c t y x) -> b c (f t) (h y) (w x)"
            parts.append(rearrange(blocks, pattern, c=3, t=frames_in, y=BLOCK, x=BLOCK))
        return torch.cat(parts, dim=2).clamp_(-1, 1)

    def _chunks(self, latent_frames: int) -> Iterator[tuple[int, Transform, int]]:
        """First latent frame, transform and count of latent frames of each part."""
        yield 0, self._first, 1
        for at in range(1, latent_frames, CHUNK):
            yield at, self._later, min(CHUNK, latent_frames - at)


def _row(channel: Channel, frames: int) -> Tensor:
    """The block that a coefficient stands for, as a vector of length 1."""
    colour = torch.tensor(_COLOURS[channel.colour], dtype=torch.float64)
    time, height, width = (
        _cosine(frequency, length)
        for frequency, length in ((channel.time, frames), (channel.height, BLOCK), (channel.width, BLOCK))
    )
    return torch.einsum("c,t,y,x->ctyx", colour / colour.norm(), time, height, width).flatten()


def _cosine(frequency: int, length: int) -> Tensor:
    """A row of the orthonormal cosine transform."""
    positions = torch.arange(length, dtype=torch.float64) + 0.5
    wave = torch.cos(math.pi * frequency * positions / length)
    return wave / wave.norm()
