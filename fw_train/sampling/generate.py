"""A clip from noise, and what the geometry branch sees in it.

Axes: T frames, F latent frames, H x W pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fw_train.batch import Batch, Prediction
from fw_train.encoders.latents import LatentCodec
from fw_train.flow import draw_noise, mix, sampling_grid, to_timestep
from fw_train.sampling.guidance import Guidance, guided_velocity
from fw_train.sampling.sampler import Solver, integrate


class SamplerParams(NamedTuple):
    steps: int
    solver: Solver
    shift: float
    guidance: Guidance
    seed: int


class Generated(NamedTuple):
    """Latents with the noise that they came from, fp32 [1, 16, F, H/8, W/8]."""

    latents: Tensor
    noise: Tensor


def generate(
    model: nn.Module,
    conditions: Batch,
    empty_text: Tensor,
    params: SamplerParams,
    dtype: torch.dtype,
    on_step: Callable[[int], None] = lambda done: None,
) -> Generated:
    """Latents of one clip; the seed alone decides the noise, whatever the device."""
    device = conditions.latents.device
    noise = draw_noise(params.seed, torch.zeros(1, dtype=torch.int64), conditions.latents.shape[1:]).to(device)
    velocity = guided_velocity(model, conditions, empty_text, params.guidance, dtype)
    latents = integrate(velocity, noise, sampling_grid(params.steps, params.shift), params.solver, on_step)
    if not torch.isfinite(latents).all():
        raise ValueError(
            "the sampled latents are not finite; lower --guidance, take more --steps, or check the weights with `fw eval`"
        )
    return Generated(latents, noise)


@torch.no_grad()
def predict_geometry(
    model: nn.Module, conditions: Batch, generated: Generated, level: float, dtype: torch.dtype, *, camera: bool
) -> Prediction:
    """Depth, points and cameras of the clip, with the noise that it came from mixed in again up to `level`.

    Without `camera` the branch has to find the cameras in the video.
    """
    s = torch.full((1,), level, device=generated.latents.device)
    batch = conditions.noised(mix(generated.latents, generated.noise, s), to_timestep(s))
    if not camera:
        batch = batch.drop_camera(torch.ones(1, dtype=torch.bool, device=s.device))
    return model(batch.to(s.device, dtype), velocity=False, geometry=True)


def decoded_frames(codec: LatentCodec, latents: Tensor) -> NDArray[np.uint8]:
    """Pictures [T, H, W, 3] of latents [1, 16, F, H/8, W/8]."""
    video = codec.decode(latents.float())[0].cpu()
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).contiguous().numpy()
