"""Memory of the loader over many samples, and what opening a long table costs."""

import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from fw_train.atomic_files import write_file
from fw_train.data.loader import LoaderParams, SourceParams, TrainingData
from fw_train.data.manifest import MANIFEST, ROW, ROWS, Dataset, ManifestShard, seal
from fw_train.data.order import SampleOrder, Stream
from fw_train.data.schema import Bucket
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
SHARD_SAMPLES = 128


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


def measure_opening(dataset: Dataset, samples: int) -> None:
    """Prints what a table of many samples costs: every row is a copy of the first sample's."""
    bucket = Bucket.parse(dataset.buckets[0].bucket)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _generate(dataset, folder, samples)
        print(f"\n| a table of {samples} samples | first batch after | CPU of the trainer | trainer | each process |")
        print("|---|---|---|---|---|")
        for workers in (0, 2):
            # In a process of its own, whose memory holds nothing else.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                seconds, cpu, own, child = pool.submit(_open, folder, bucket, workers).result()
            print(f"| {workers} processes | {seconds:.2f} s | {cpu:.2f} s | {own:.0f} MB | {child:.0f} MB |")
    order = SampleOrder(0, [Stream("all", 5 * samples, 1.0)], [(0, 64)])
    start, start_cpu = time.perf_counter(), time.process_time()
    order.step_ids(3 * samples // 64)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    print(
        f"\nresuming at sample {3 * samples} of {5 * samples}: {seconds:.2f} s, of which {cpu:.2f} s on the processor"
    )


def _generate(dataset: Dataset, folder: Path, samples: int) -> None:
    """A dataset whose rows all lead to the first sample of another."""
    first = dataset.manifest.shards[0]
    row = (dataset.folder / ROWS).read_bytes()[: ROW.itemsize]
    write_file(folder / ROWS, row * samples)
    lines: list[ManifestShard] = []
    for start in range(0, samples, SHARD_SAMPLES):
        totals = replace(first.totals, samples=min(SHARD_SAMPLES, samples - start))
        lines.append(replace(first, shard=f"shard-{len(lines):06}", first=start, totals=totals))
    header = replace(dataset.manifest.header, samples=samples, shards=len(lines))
    write_file(folder / MANIFEST, seal([asdict(header), *map(asdict, lines)]))
    (folder / f"{first.shard}.tar").symlink_to((dataset.folder / f"{first.shard}.tar").resolve())


def _open(folder: Path, bucket: Bucket, workers: int) -> tuple[float, float, float, float]:
    """Seconds to the first batch, of the clock and the processor; memory of this and of a loader process then; no imports."""
    size = bucket.height, bucket.width
    params = LoaderParams(bucket.frames, (size,), "online", (), video=True, workers=workers)
    start, start_cpu = time.perf_counter(), time.process_time()
    data = TrainingData([SourceParams(str(folder))], params, seed=0)
    batches = data.batches([(0, 1)], 0, 10**9, rank=0, world=1, micro_batch=1)
    next(batches)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    children = [resident_mb(child.pid) for child in multiprocessing.active_children() if child.pid]
    return seconds, cpu, resident_mb("self"), max(children, default=0.0)
