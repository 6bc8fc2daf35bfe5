"""Memory of the loader's processes over many samples."""

import multiprocessing
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from fw_train.atomic_files import write_file
from fw_train.data.loader import LoaderParams, SourceParams, TrainingData
from fw_train.pictures.drawing import (
    FAINT,
    GRID,
    MARGIN,
    PAPER,
    SMALL,
    WHITE,
    Picture,
    png_bytes,
    stroke,
    text_width,
    write,
)

POINTS = 50  # measurements over a run
SIZE_PX = 360, 760


def measure_memory(out: Path, params: LoaderParams, samples: int, plot: Path | None) -> None:
    """Prints, and draws, the memory of the main process and of the loader processes over a run."""
    data = TrainingData([SourceParams(str(out))], params, seed=0)
    every, taken, found = max(1, samples // POINTS), [], []
    start = time.monotonic()
    batches = data.batches([(0, 1)], 0, samples, rank=0, world=1, micro_batch=1)
    for number, _ in enumerate(batches, 1):
        if number % every == 0:
            children = [child.pid for child in multiprocessing.active_children() if child.pid]
            taken.append(number)
            found.append([resident_mb("self"), *(resident_mb(pid) for pid in sorted(children))])
    seconds = time.monotonic() - start
    columns = [list(column) for column in zip(*found, strict=True)]
    names = ["trainer", *(f"process {number}" for number in range(1, len(columns)))]
    print(f"\n{samples} samples in {seconds:.0f} s\n\n| | after {taken[len(taken) // 5]} samples | most | at the end |")
    print("|---|---|---|---|")
    for name, values in zip(names, columns, strict=True):
        print(f"| {name} | {values[len(values) // 5]:.0f} MB | {max(values):.0f} MB | {values[-1]:.0f} MB |")
    if plot is not None:
        write_file(plot, png_bytes(_lines_picture(taken, columns, names)))


def resident_mb(pid: int | str) -> float:
    """Memory of a process that lies in RAM; pages that several share count for each."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    return 0.0


def _lines_picture(taken: Sequence[int], columns: Sequence[Sequence[float]], names: Sequence[str]) -> Picture:
    """Megabytes over samples, a line each."""
    height, width = SIZE_PX
    picture = np.full((height, width, 3), PAPER, np.uint8)
    highest = 1.1 * max(map(max, columns))
    left, right, top, floor = 70, width - 140, 40, height - 40
    write(picture, (MARGIN, 10), "resident memory, MB, over samples", SMALL, WHITE)
    for share in (0, 0.25, 0.5, 0.75, 1):
        row = round(floor - share * (floor - top))
        picture[row, left:right] = GRID
        label = f"{share * highest:.0f}"
        write(picture, (left - 8 - text_width(label, 1), row - 4), label, 1, FAINT)
        label = f"{share * taken[-1]:.0f}"
        write(picture, (round(left + share * (right - left)) - text_width(label, 1) // 2, floor + 10), label, 1, FAINT)
    for number, (values, name) in enumerate(zip(columns, names, strict=True)):
        colour = ((60, 140, 255), (255, 180, 50), (120, 220, 120), (230, 110, 200))[number % 4]
        places = [
            np.array((left + at / taken[-1] * (right - left), floor - value / highest * (floor - top)))
            for at, value in zip(taken, values, strict=True)
        ]
        for a, b in pairwise(places):
            stroke(picture, a, b, 0.9, colour)
        write(picture, (right + 10, 60 + 14 * number), name, 1, colour)
    return picture
