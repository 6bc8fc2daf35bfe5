"""What a network can do on held-out clips, on noise that never changes.

    geometry   at noise levels 0.1 (by which readiness is judged), 0.5 and 0.9 with the camera hidden, and at 0.1 with it
    diffusion  in ten bins of the noise level, with camera and text

Sample i gets the noise of position i under a seed of its own, whatever the number of ranks, so that figures of different
steps and runs compare.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fw_train.batch import Batch, Prediction
from fw_train.evaluation.diffusion import BINS, bin_level, velocity_error
from fw_train.flow import draw_noise, mix, to_timestep, velocity_target
from fw_train.losses import LossParams, SampleLosses, sample_losses

JUDGED_LEVEL = 0.1
SEED_APART = 1 << 32  # validation noise is not that of any training position
GEOMETRY = ("depth", "point", "camera")


class Case(NamedTuple):
    """A noise level, and whether the geometry branch sees the camera that it is to predict."""

    name: str
    level: float
    camera: bool


CASES = (
    Case("", JUDGED_LEVEL, camera=False),
    Case("_s0.5", 0.5, camera=False),
    Case("_s0.9", 0.9, camera=False),
    Case("_with_camera", JUDGED_LEVEL, camera=True),
)


class Validation(NamedTuple):
    """Means over the clips; `values` as validation/depth_loss, `diffusion_bins` by rising noise level."""

    values: dict[str, float]
    diffusion_bins: list[float] | None


class Tally:
    """Sums and counts that ranks add up before they divide."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, counted: Tensor) -> None:
        """Values fp32 [B] where `counted` [B]."""
        entry = torch.stack((torch.where(counted, value.double(), 0).sum(), counted.double().sum())).cpu()
        self.sums[name] = self.sums[name] + entry if name in self.sums else entry

    def means(self, names: Sequence[str], all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all ranks of those names that anyone counted."""
        zero = torch.zeros(2, dtype=torch.float64)
        total = all_sum(torch.stack([self.sums.get(name, zero) for name in names]))
        return {name: float(s / n) for name, (s, n) in zip(names, total, strict=True) if n > 0}


def validate(
    module: nn.Module,
    batches: Iterator[tuple[Batch, bool]],
    *,
    seed: int,
    dtype: torch.dtype,
    geometry: bool,
    diffusion: bool,
    all_sum: Callable[[Tensor], Tensor],
) -> Validation:
    """Runs the network over clean batches, each with whether it counts: ranks with fewer clips repeat one uncounted.

    All ranks must bring the same number of batches, because sharded engines run every forward pass together.
    """
    tally = Tally()
    names = [f"validation/{term}_loss{case.name}" for case in CASES for term in GEOMETRY] if geometry else []
    bins = [f"bin{index}" for index in range(BINS)] if diffusion else []
    with torch.no_grad():
        for batch, counts in batches:
            if geometry:
                for case in CASES:
                    prediction = predict(module, batch, case.level, seed, dtype, camera=case.camera)
                    _count(tally, case.name, sample_losses(prediction, batch, None, LossParams("guide")), counts)
            for index in range(BINS) if diffusion else ():
                error = diffusion_error(module, batch, bin_level(index), seed, dtype)
                tally.add(f"bin{index}", error, torch.full_like(error, counts, dtype=torch.bool))
    means = tally.means([*names, *bins], all_sum)
    values = {name: means[name] for name in names if name in means}
    per_bin = [means[name] for name in bins] if bins and all(name in means for name in bins) else None
    if per_bin is not None:
        values["validation/diffusion"] = sum(per_bin) / BINS
    return Validation(values, per_bin)


def predict(
    module: nn.Module, batch: Batch, level: float, seed: int, dtype: torch.dtype, *, camera: bool
) -> Prediction:
    """Depth, points and cameras of a clean batch at a noise level."""
    noisy, _ = _noised(batch, level, seed)
    if not camera:
        noisy = noisy.drop_camera(torch.ones(len(batch.latents), dtype=torch.bool, device=batch.latents.device))
    return module(noisy.to(batch.latents.device, dtype), velocity=False, geometry=True)


def diffusion_error(module: nn.Module, batch: Batch, level: float, seed: int, dtype: torch.dtype) -> Tensor:
    """Mean square error of the velocity, fp32 [B], camera and text given."""
    noisy, target = _noised(batch, level, seed)
    prediction = module(noisy.to(batch.latents.device, dtype), velocity=True, geometry=False)
    return velocity_error(prediction.velocity, target)


def _noised(batch: Batch, level: float, seed: int) -> tuple[Batch, Tensor]:
    if batch.position is None:
        raise ValueError("a validation batch needs positions: they select its noise")
    clean = batch.latents.float()
    noise = draw_noise(seed + SEED_APART, batch.position, clean.shape[1:]).to(clean.device)
    s = torch.full((len(clean),), level, dtype=torch.float32, device=clean.device)
    return replace(batch.noised(mix(clean, noise, s), to_timestep(s))), velocity_target(clean, noise)


def _count(tally: Tally, case: str, losses: SampleLosses, counts: bool) -> None:
    for name in GEOMETRY:
        term = getattr(losses, name)
        tally.add(f"validation/{name}_loss{case}", term.value, term.counted & counts)
