"""What came of an evaluation: as a document for programs, and as a table for people."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fw_train.evaluation.metrics import DIFFUSION, GEOMETRY, Metric

BEST, MISSING = "*", "-"


class Judged(NamedTuple):
    """A checkpoint and what it scores."""

    name: str  # unlike that of any other
    path: str
    stage: str
    step: int
    metrics: dict[str, float]


class Evaluation(NamedTuple):
    data: str
    clips: int
    level: float
    seed: int
    checkpoints: list[Judged]
    constant: dict[str, float]  # empty where there are no training data
    pictures: list[str]  # relative to the document


def document(evaluation: Evaluation) -> dict[str, Any]:
    """Plain mappings, with the directions of the metrics beside them."""
    tree = evaluation._asdict()
    tree["checkpoints"] = [judged._asdict() for judged in evaluation.checkpoints]
    tree["better"] = {metric.name: metric.better for metric in (*GEOMETRY, *DIFFUSION)}
    return tree


def table(evaluation: Evaluation) -> str:
    """A line for each metric, a column for each checkpoint; a star marks the best network of several."""
    columns = [judged.metrics for judged in evaluation.checkpoints]
    names = [judged.name for judged in evaluation.checkpoints]
    if evaluation.constant:
        columns, names = [*columns, evaluation.constant], [*names, "constant"]
    lines = [["", "better", *names]]
    networks = len(evaluation.checkpoints)
    for name, metric in _rows(columns):
        values = [column.get(name) for column in columns]
        best = best_of(values[:networks], metric) if networks > 1 else None
        cells = [_cell(value, starred=number == best) for number, value in enumerate(values)]
        lines.append([name, metric.better, *cells])
    widths = [max(len(line[number]) for line in lines) for number in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def best_of(values: Sequence[float | None], metric: Metric) -> int | None:
    """The place of the best value that is a number; None where there is none."""
    found = [(value, place) for place, value in enumerate(values) if value is not None and math.isfinite(value)]
    if not found:
        return None
    return (min if metric.better == "lower" else max)(found, key=lambda pair: pair[0])[1]


def _rows(columns: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, Metric]]:
    """Names that any column has with their metrics, case by case."""
    metrics = {metric.name: metric for metric in (*GEOMETRY, *DIFFUSION)}
    present = list(dict.fromkeys(name for column in columns for name in column))
    suffixes = dict.fromkeys(suffix for name in present for suffix in [_suffix(name, metrics)])
    for suffix in suffixes:
        for name, metric in metrics.items():
            if name + suffix in present:
                yield name + suffix, metric


def _suffix(name: str, metrics: Mapping[str, Metric]) -> str:
    known = max((metric for metric in metrics if name.startswith(metric)), key=len)
    return name.removeprefix(known)


def _cell(value: float | None, *, starred: bool) -> str:
    if value is None:
        return MISSING + " "
    return f"{value:.4f}" + (BEST if starred else " ")
