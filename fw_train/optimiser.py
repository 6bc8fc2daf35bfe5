"""The optimiser and its learning rate: a pure function of the optimiser step, so that nothing needs restoring after a restart."""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from fw_train.stages import ParameterGroup

Schedule = Literal["constant", "cosine"]


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, schedule: Schedule) -> float:
    """The rate of optimiser step `step`, counted from 0; the first step after a warm-up of 0 runs at `peak` already.

    A warm-up rises linearly and its last step has the full rate; a cosine then falls to 0 at `total_steps`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimiser(groups: Sequence[ParameterGroup], rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with the stage's groups, fused where the device has it; each group keeps its name and its relative rate."""
    parameters = [p for group in groups for p in group.parameters.values()]
    settings = [
        {
            "params": list(group.parameters.values()),
            "name": group.name,
            "lr_scale": group.lr_scale,
            "lr": rate * group.lr_scale,
            "weight_decay": weight_decay if group.weight_decay else 0.0,
        }
        for group in groups
    ]
    return torch.optim.AdamW(settings, lr=rate, fused=all(p.is_cuda for p in parameters))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group its share of the rate; to be called before each optimiser step, never per micro-batch."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_scale"]
