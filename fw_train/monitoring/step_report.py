"""What all ranks learn about a step from each other, in one reduction: losses, wishes to stop, substitutes, times."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class OwnStep(NamedTuple):
    """What one rank brings."""

    losses: Mapping[str, Tensor]  # sums over its micro-batches of each term's mean
    micro_batches: int
    stop: bool
    save_due: bool  # rank 0's clock decides
    substituted: int  # samples that could not be read
    compute_s: float  # until its gradients wait for the others'
    data_wait_s: float


class GlobalStep(NamedTuple):
    """What all ranks know afterwards, bit for bit the same."""

    losses: dict[str, float]  # means over all micro-batches of all ranks
    stop: bool
    save_due: bool
    substituted: int
    compute_s: list[float]  # by rank
    data_wait_s: float  # the longest


def share(own: OwnStep, rank: int, world: int, all_sum: Callable[[Tensor], Tensor]) -> GlobalStep:
    """Adds up the ranks' reports; all must bring the same losses."""
    names = sorted(own.losses)
    head = [*(own.losses[name].double().cpu() for name in names)]
    counts = torch.tensor([own.micro_batches, own.stop, own.save_due, own.substituted], dtype=torch.float64)
    times = torch.zeros(2, world, dtype=torch.float64)
    times[:, rank] = torch.tensor([own.compute_s, own.data_wait_s])
    total = all_sum(torch.cat((torch.stack(head), counts, times.flatten())))
    sums, counts, times = total.split((len(names), len(counts), times.numel()))
    count, stop, save_due, substituted = counts
    return GlobalStep(
        {name: float(value / count) for name, value in zip(names, sums, strict=True)},
        bool(stop > 0),
        bool(save_due > 0),
        int(substituted),
        times[:world].tolist(),
        float(times[world:].max()),
    )


def describe_bad_step(problem: str, own: OwnStep, keys: Sequence[str], gather: Callable[[str], list[str]]) -> str:
    """The problem with every rank's samples, and the terms that were not finite there; all ranks together."""
    bad = [name for name, value in own.losses.items() if not torch.isfinite(value)]
    lines = gather(f"{', '.join(keys)}" + (f" ({', '.join(bad)} not finite)" if bad else ""))
    return f"step skipped: {problem}; samples: " + "; ".join(f"rank {rank}: {line}" for rank, line in enumerate(lines))
