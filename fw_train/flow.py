"""Flow matching: the noise a sample gets, the path from data to noise, and the way back.

`s` in [0, 1] is the noise level: x_t = (1 - s) x0 + s noise, velocity = noise - x0, timestep = 1000 s.
All of it is fp32: bf16 would merge the 1000 timesteps of the usual grid into 294.

What a sample draws is a function of (seed, position) alone, position being its place in the global sample order.
So it depends neither on the device, nor on the number of ranks, nor on its batch, nor on what was drawn before it.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

TIMESTEPS = 1000  # the network's time runs from 0 to this
SHIFT = 5.0  # Wan's: the median training sample has s = 0.83, 8 % have s < 0.3


class Draw(NamedTuple):
    """What the samples of one batch draw; B samples."""

    noise: Tensor  # fp32 [B, *latent_shape]
    s: Tensor  # fp32 [B], noise level
    timestep: Tensor  # fp32 [B], 1000 s
    camera_dropped: Tensor  # bool [B]
    text_dropped: Tensor  # bool [B]


def draw_sample_noise(
    seed: int,
    position: Tensor,
    latent_shape: Sequence[int],
    *,
    shift: float = SHIFT,
    camera_drop: float,
    text_drop: float,
) -> Draw:
    """Everything random about training on the samples at `position` (int64 [B]), on the device of `position`."""
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}; 1 draws s uniformly, 5 is Wan's")
    for name, probability in (("camera_drop", camera_drop), ("text_drop", text_drop)):
        if not 0 <= probability <= 1:
            raise ValueError(f"{name} must be a probability, got {probability}; use a value from 0 to 1")
    s = shifted(_uniform(seed, position, "s"), shift).float()
    return Draw(
        noise=draw_noise(seed, position, latent_shape),
        s=s,
        timestep=to_timestep(s),
        camera_dropped=_uniform(seed, position, "camera") < camera_drop,
        text_dropped=_uniform(seed, position, "text") < text_drop,
    )


def draw_noise(seed: int, position: Tensor, latent_shape: Sequence[int]) -> Tensor:
    """Standard normal noise fp32 [B, *latent_shape]: made on the CPU, whatever the device it is then sent to."""
    samples = []
    for place in _places(position):
        # torch's CPU generator reads the low 32 bits of its seed: among a million samples about a hundred pairs share
        # their noise, on different data and at different levels.
        generator = torch.Generator().manual_seed(_hash64(seed, place, "noise"))
        samples.append(torch.randn(tuple(latent_shape), generator=generator))
    return torch.stack(samples).to(position.device)


def shifted(u: Tensor, shift: float) -> Tensor:
    """Moves uniform noise levels towards noise: shift u / (1 + (shift - 1) u), which keeps 0 and 1 in place."""
    return shift * u / (1 + (shift - 1) * u)


def to_timestep(s: Tensor) -> Tensor:
    """The network's time for noise level s; s must not have been in half precision."""
    _check_precision(s)
    return TIMESTEPS * s.float()


def mix(x0: Tensor, noise: Tensor, s: Tensor) -> Tensor:
    """x_t fp32 [B, ...] at the noise levels s, [B] or a scalar."""
    s = _broadcast(s, x0)
    return (1 - s) * x0.float() + s * noise.float()


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """dx_t / ds, fp32: what the network learns to predict."""
    return noise.float() - x0.float()


def estimate_x0(x_t: Tensor, velocity: Tensor, s: Tensor) -> Tensor:
    """The clean latents fp32 [B, ...] that a velocity at noise level s, [B] or a scalar, points at."""
    return x_t.float() - _broadcast(s, x_t) * velocity.float()


def sampling_grid(steps: int, shift: float = SHIFT) -> Tensor:
    """The noise levels of a sampler, fp32 [steps + 1], decreasing from 1 to 0."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def euler_step(x: Tensor, velocity: Tensor, s_from: Tensor, s_to: Tensor) -> Tensor:
    """Moves x, fp32 [B, ...], along the velocity from one noise level to another, each [B] or a scalar."""
    return x.float() + _broadcast(s_to - s_from, x) * velocity.float()


def _broadcast(s: Tensor, x: Tensor) -> Tensor:
    """s, [B] or a scalar, in fp32 and with as many axes as x [B, ...]."""
    _check_precision(s)
    if s.shape not in ((), x.shape[:1]):
        raise ValueError(f"noise levels {tuple(s.shape)} do not fit x {tuple(x.shape)}; give [B] or a scalar")
    # A scalar stays one: then it may live on the CPU whatever the device of x.
    return s.float().reshape(s.shape + (1,) * (x.ndim - 1)) if s.ndim else s.float()


def _check_precision(s: Tensor) -> None:
    if s.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noise levels must stay fp32 until they are embedded, got {s.dtype}; do not cast s")


def _uniform(seed: int, position: Tensor, purpose: str) -> Tensor:
    """One number in [0, 1) per sample, fp64 [B]."""
    # 53 bits are what fp64 holds: more would round the largest hashes to 1, and a probability of 1 would miss.
    drawn = [(_hash64(seed, place, purpose) >> 11) / 2**53 for place in _places(position)]
    return torch.tensor(drawn, dtype=torch.float64, device=position.device)


def _hash64(seed: int, place: int, purpose: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{place}/{purpose}".encode(), digest_size=8).digest(), "little")


def _places(position: Tensor) -> list[int]:
    if position.dtype != torch.int64 or position.ndim != 1:
        raise ValueError(f"position must be int64 [B], got {position.dtype} {tuple(position.shape)}")
    return position.tolist()
