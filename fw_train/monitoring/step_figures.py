"""From the steps of an interval to the figures of the log: means, rates and shares, by plain arithmetic."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

GIB = 1 << 30


@dataclass(frozen=True)
class RunFacts:
    """What does not change while a run lasts."""

    total_steps: int
    global_batch: int
    world_size: int
    flops_per_sample: float  # of the model, forward and backward, without recomputation
    tokens_per_sample: int  # video tokens
    peak_flops_per_gpu: float | None  # FLOP/s; None: not known, and the MFU is left out
    config_text: str  # YAML
    code_version: str
    hparams: dict[str, int | float | str | bool]


@dataclass(frozen=True)
class StepRecord:
    """A step that was just done, as all ranks saw it together."""

    step: int  # from 0
    losses: dict[str, float]  # global means under their full names; a term that was not computed is absent
    learning_rates: dict[str, float]  # by parameter group, the main one first
    grad_norm: float  # of the whole gradient before clipping
    group_norms: dict[str, float]
    gates: dict[str, float]  # magnitudes; empty on most steps
    applied: bool
    reason: str  # why it was not
    seconds: float  # of the whole step by the wall; saves, validation and pictures lie outside it
    data_wait_s: float  # the longest of all ranks
    save_stall_s: float  # how long the loop stood still for a save after this step
    peak_memory_bytes: int
    samples: int
    substituted: int  # samples that could not be read and were replaced
    parts_s: dict[str, float]


@dataclass(frozen=True)
class Totals:
    """Counts since the beginning of the run, earlier starts included."""

    skipped_steps: int = 0
    skipped_samples: int = 0
    substituted_samples: int = 0

    def plus(self, record: StepRecord) -> "Totals":
        skipped = not record.applied
        return Totals(
            self.skipped_steps + skipped,
            self.skipped_samples + skipped * record.samples,
            self.substituted_samples + record.substituted,
        )


def interval_figures(records: Sequence[StepRecord], facts: RunFacts, totals: Totals) -> dict[str, float]:
    """Every scalar of the log under its tag, for the steps since the last logged one.

    Losses and gradients are means over the applied steps, rates are over all steps. Learning rates and gates are the last
    ones, memory is the highest, stalls are summed, skipped and substituted samples count from the beginning of the run.
    """
    applied = [record for record in records if record.applied]
    seconds = sum(record.seconds for record in records)
    samples_per_s = sum(record.samples for record in records) / seconds
    figures = _means(record.losses for record in applied)
    figures |= {f"optimiser_learning_rate/{name}": rate for name, rate in records[-1].learning_rates.items()}
    if applied:
        figures["optimiser/gradient_norm"] = _mean([record.grad_norm for record in applied])
        figures["optimiser/gradient_norm_highest"] = max(record.grad_norm for record in applied)
    norms = _means(record.group_norms for record in applied)
    figures |= {f"optimiser_gradient_norm/{name}": norm for name, norm in norms.items()}
    for record in records:
        figures |= {f"optimiser_gates/{name}": gate for name, gate in record.gates.items()}
    figures |= {
        "throughput/seconds_per_step": seconds / len(records),
        "throughput/samples_per_s": samples_per_s,
        "throughput/tokens_per_s": samples_per_s * facts.tokens_per_sample,
        "throughput/data_wait_percent": 100 * sum(record.data_wait_s for record in records) / seconds,
        "throughput/save_stall_s": sum(record.save_stall_s for record in records),
        "throughput/peak_memory_gib": max(record.peak_memory_bytes for record in records) / GIB,
    }
    if facts.peak_flops_per_gpu is not None:
        peak = facts.world_size * facts.peak_flops_per_gpu
        figures["throughput/mfu_percent"] = 100 * facts.flops_per_sample * samples_per_s / peak
    parts = _means(record.parts_s for record in records)
    figures |= {f"step_parts/{name}_s": part for name, part in parts.items()}
    figures |= {f"samples/{name}": value for name, value in vars(totals).items()}
    return figures


def bin_names(bins: int, timesteps: int = 1000) -> list[str]:
    """Names of equal ranges of the timestep, in the order of the letters: t0000-0100, ..."""
    edges = [round(i * timesteps / bins) for i in range(bins + 1)]
    return [f"t{low:04}-{high:04}" for low, high in pairwise(edges)]


def _means(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each name over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: _mean(found) for name, found in values.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values) / len(values)
