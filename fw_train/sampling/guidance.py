"""Classifier-free guidance: away from what the network makes without the text, and from what it makes without the camera."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fw_train.batch import Batch
from fw_train.flow import to_timestep
from fw_train.sampling.sampler import Velocity


class Guidance(NamedTuple):
    """1 takes the network at its word, at no cost; any other value costs one more pass for every velocity."""

    text: float = 1.0
    camera: float = 1.0

    @property
    def passes(self) -> int:
        return 1 + (self.text != 1) + (self.camera != 1)


def guided_velocity(
    model: nn.Module, conditions: Batch, empty_text: Tensor, guidance: Guidance, dtype: torch.dtype
) -> Velocity:
    """The velocity v + (text - 1) (v - v without text) + (camera - 1) (v - v without camera), in fp32.

    `conditions` is a batch whose latents do not matter, `empty_text` [L, D] embeds the empty prompt.
    """
    device = conditions.latents.device
    complete = conditions.to(device, dtype)
    everyone = torch.ones(len(conditions.latents), dtype=torch.bool, device=device)
    away = []
    if guidance.text != 1:
        away.append((guidance.text - 1, complete.drop_text(everyone, empty_text.to(device))))
    if guidance.camera != 1:
        away.append((guidance.camera - 1, complete.drop_camera(everyone)))

    def unguided(batch: Batch, x: Tensor, s: Tensor) -> Tensor:
        timestep = to_timestep(s).to(device).expand(len(x))
        return model(batch.noised(x.to(dtype), timestep), velocity=True, geometry=False).velocity.float()

    @torch.no_grad()
    def velocity(x: Tensor, s: Tensor) -> Tensor:
        v = unguided(complete, x, s)
        guided = v
        for weight, without in away:
            guided = guided + weight * (v - unguided(without, x, s))
        return guided

    return velocity
