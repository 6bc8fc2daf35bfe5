"""One forward pass of training: batch -> noise and dropouts -> network -> losses. Knows no engine, rank or schedule."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fw_train.batch import Batch, Prediction
from fw_train.flow import Draw, draw_sample_noise, mix, velocity_target
from fw_train.losses import LossParams, LossTerms, compute_losses


@dataclass(frozen=True)
class StepParams:
    stage: str
    dtype: torch.dtype  # of the network's inputs
    seed: int = 0
    shift: float = 5.0
    camera_drop: float = 0.17
    text_drop: float = 0.1
    losses: LossParams = field(default_factory=LossParams)


def train_step(
    model: nn.Module, batch: Batch, params: StepParams, empty_text: Tensor, *, log_diffusion: bool = False
) -> LossTerms:
    """Losses of a batch of clean latents with their positions; `empty_text` [L, 4096] embeds the empty prompt.

    Stage 1 needs no velocity, so its diffusion loss exists only where `log_diffusion` asks for it, without a gradient.
    """
    noisy, target = noised_batch(batch, params, empty_text)
    diffusion_trains = params.stage != "stage1"
    velocity, geometry = diffusion_trains or log_diffusion, params.stage != "stage0"
    prediction: Prediction = model(noisy, velocity=velocity, geometry=geometry)
    return compute_losses(
        prediction, batch, target if velocity else None, params.losses, diffusion_in_total=diffusion_trains
    )


def noised_batch(batch: Batch, params: StepParams, empty_text: Tensor) -> tuple[Batch, Tensor]:
    """The network's input and the fp32 velocity that it should predict; a function of (seed, position) and the data alone."""
    if batch.position is None:
        raise ValueError(
            "the batch has no positions; the noise of a sample is drawn from its place in the global order"
        )
    clean = batch.latents.float()
    draw = draw_sample_noise(
        params.seed,
        batch.position,
        clean.shape[1:],
        shift=params.shift,
        camera_drop=params.camera_drop,
        text_drop=params.text_drop,
    )
    # Positions may have stayed on the CPU, where the noise is made.
    draw = Draw(*(tensor.to(clean.device, non_blocking=True) for tensor in draw))
    noisy = batch.noised(mix(clean, draw.noise, draw.s), draw.timestep)
    noisy = noisy.drop_camera(draw.camera_dropped).drop_text(draw.text_dropped, empty_text)
    return noisy.to(clean.device, params.dtype), velocity_target(clean, draw.noise)
