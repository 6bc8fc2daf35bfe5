"""Networks, and the constant prediction, judged on held-out clips; every rank takes its share and all get the same means.

Metrics carry the name of the case they were measured in behind their own: none for the level that is judged by.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fw_train.batch import Batch, Prediction
from fw_train.evaluation.constant import Size, constant_for
from fw_train.evaluation.diffusion import BINS, bin_level, bin_name
from fw_train.evaluation.metrics import GEOMETRY, clip_metrics
from fw_train.evaluation.validation import CASES, Case, Tally, diffusion_error, predict

Clips = Iterator[tuple[Batch, bool]]  # one clip each, and whether it counts
AllSum = Callable[[Tensor], Tensor]


def cases(level: float, others: bool) -> tuple[Case, ...]:
    """The level that is judged by with the camera hidden, and the other cases of validation if asked for."""
    judged = CASES[0]._replace(level=level)
    return (judged, *CASES[1:]) if others else (judged,)


def judge_geometry(
    module: nn.Module, clips: Clips, judged: Sequence[Case], *, seed: int, dtype: torch.dtype, all_sum: AllSum
) -> dict[str, float]:
    """Means over the clips of every metric of geometry that any clip has, in every case."""
    tally = Tally()
    with torch.no_grad():
        for batch, counts in clips:
            for case in judged if counts else ():
                prediction = predict(module, batch, case.level, seed, dtype, camera=case.camera)
                _count(tally, clip_metrics(prediction, batch), case.name)
    return tally.means([metric.name + case.name for case in judged for metric in GEOMETRY], all_sum)


def judge_diffusion(
    module: nn.Module, clips: Clips, *, seed: int, dtype: torch.dtype, all_sum: AllSum
) -> dict[str, float]:
    """The velocity's error in the ranges of the timestep, camera and text given."""
    tally, names = Tally(), [f"diffusion/{bin_name(index)}" for index in range(BINS)]
    with torch.no_grad():
        for batch, counts in clips:
            for index, name in enumerate(names if counts else ()):
                _count(tally, {name: float(diffusion_error(module, batch, bin_level(index), seed, dtype))})
    means = tally.means(names, all_sum)
    return {"diffusion/mean": sum(means.values()) / BINS, **means}


def judge_constant(means: dict[Size, Prediction], clips: Clips, *, all_sum: AllSum) -> dict[str, float]:
    """The same of the constant prediction, which no noise level changes."""
    tally = Tally()
    for batch, counts in clips:
        if counts:
            _count(tally, clip_metrics(constant_for(means, batch), batch))
    return tally.means([metric.name for metric in GEOMETRY], all_sum)


def _count(tally: Tally, scores: dict[str, float], case: str = "") -> None:
    for name, value in scores.items():
        tally.add(name + case, torch.tensor([value], dtype=torch.float64), torch.tensor([True]))
