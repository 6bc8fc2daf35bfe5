"""What opening a table of many samples costs until the first batch is there: time, and memory of all processes.

The table is generated: its rows lead to the first sample of a packed dataset, but for those that are put in quarantine.
"""

import multiprocessing
import os
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.bench_sidecars import NOISE_KINDS, with_noise_sidecars
from fw_train.atomic_files import write_file
from fw_train.data import sidecar_files
from fw_train.data.loader import LoaderParams, SourceParams, TrainingData
from fw_train.data.manifest import MANIFEST, ROW, ROWS, Dataset, ManifestShard, seal
from fw_train.data.order import SampleOrder, Stream
from fw_train.data.quarantine import QuarantineEntry, write_quarantine
from fw_train.data.schema import Bucket
from fw_train.data.sidecar_files import SIDECAR

SHARD_SAMPLES = 128
QUARANTINED = 1000


class Memory(NamedTuple):
    """Of a process, in MB."""

    resident: float  # pages that several processes share count for each
    batches: float  # of that, shared memory
    share: float  # resident, a page that n processes share counts as 1/n


class Opening(NamedTuple):
    """A dataset just opened, its first batch taken."""

    seconds: float
    cpu: float  # of the trainer
    cpu_all: float  # of all processes, what they read ahead included
    trainer: Memory
    processes: tuple[Memory, ...]


def measure_opening(out: Path, samples: int, workers: Sequence[int]) -> None:
    """Prints what a table of many samples costs, with and without sidecars and quarantine; and what a resume within it does."""
    bucket = Bucket.parse(Dataset(out).buckets[0].bucket)
    size = bucket.height, bucket.width
    video = LoaderParams(bucket.frames, (size,), "online", (), video=True)
    latents = LoaderParams(bucket.frames, (size,), "sidecar", NOISE_KINDS)
    print(
        f"\n| a table of {samples} samples | processes | first batch after | CPU of the trainer | of all | trainer, MB: "
        "resident (batches), share | each process |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as first, tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder = Path(name)
        _generate(with_noise_sidecars(out, Path(first)), folder, samples)
        _print_openings("labels, video", folder, video, workers)
        _print_openings("labels, latents, texts", folder, latents, workers)
        count = _quarantine(folder, samples)
        _print_openings(f"labels, latents, texts, {count} in quarantine", folder, latents, workers)
    order = SampleOrder(0, [Stream("all", 5 * samples, 1.0)], [(0, 64)])
    start, start_cpu = time.perf_counter(), time.process_time()
    order.step_ids(3 * samples // 64)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    print(
        f"\nresuming at sample {3 * samples} of {5 * samples}: {seconds:.2f} s, of which {cpu:.2f} s on the processor"
    )


def _print_openings(name: str, folder: Path, params: LoaderParams, workers: Sequence[int]) -> None:
    for count in workers:
        # In a process of its own, whose memory holds nothing else.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(_open, folder, replace(params, workers=count)).result()
        largest = max(found.processes, key=lambda memory: memory.resident, default=None)
        cells = [f"{found.seconds:.2f} s", f"{found.cpu:.2f} s", f"{found.cpu_all:.2f} s"]
        cells += [
            "" if m is None else f"{m.resident:.0f} ({m.batches:.0f}), {m.share:.0f}" for m in (found.trainer, largest)
        ]
        print(f"| {name} | {count} | {' | '.join(cells)} |", flush=True)


def _open(folder: Path, params: LoaderParams) -> Opening:
    """Opens a dataset in this process; its imports are done and take no time."""
    start, start_cpu = time.perf_counter(), time.process_time()
    data = TrainingData([SourceParams(str(folder))], params, seed=0)
    batches = data.batches([(0, 1)], 0, 10**9, rank=0, world=1, micro_batch=1)
    next(batches)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    children = [child.pid for child in multiprocessing.active_children() if child.pid]
    processes = tuple(_memory(pid) for pid in children)
    own = _memory(os.getpid())
    cpu_all = cpu + sum(_cpu_seconds(pid) for pid in _below(os.getpid()))
    batches.close()
    return Opening(seconds, cpu, cpu_all, own, processes)


def _memory(pid: int) -> Memory:
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, kib, *_ = line.split()
        found[name] = int(kib) * 1.024e-3
    shared = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssShmem:"))
    return Memory(found["Rss:"], int(shared.split()[1]) * 1.024e-3, found["Pss:"])


def _below(pid: int) -> Iterator[int]:
    """All processes that a process has begun, and those that these have."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from _below(child)


def _cpu_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _generate(dataset: Dataset, folder: Path, samples: int) -> None:
    """A dataset and its sidecars whose rows all lead to the first sample of another."""
    first = dataset.manifest.shards[0]
    write_file(folder / ROWS, (dataset.folder / ROWS).read_bytes()[: ROW.itemsize] * samples)
    lines: list[ManifestShard] = []
    for start in range(0, samples, SHARD_SAMPLES):
        totals = replace(first.totals, samples=min(SHARD_SAMPLES, samples - start))
        lines.append(replace(first, shard=f"shard-{len(lines):06}", first=start, totals=totals))
    header = replace(dataset.manifest.header, samples=samples, shards=len(lines))
    write_file(folder / MANIFEST, seal([asdict(header), *map(asdict, lines)]))
    _link(dataset.folder, folder, f"{first.shard}.tar")
    for kind in NOISE_KINDS:
        _generate_sidecar(dataset.folder / kind, folder / kind, kind, lines)


def _generate_sidecar(source: Path, folder: Path, kind: str, shards: Sequence[ManifestShard]) -> None:
    header, facts, lines = sidecar_files.read_manifest(source, kind)
    folder.mkdir()
    samples = sum(shard.totals.samples for shard in shards)
    write_file(folder / ROWS, (source / ROWS).read_bytes()[: sidecar_files.ROW.itemsize] * samples)
    many = [replace(lines[0], shard=shard.shard, samples=shard.totals.samples) for shard in shards]
    header = replace(header, samples=samples, shards=len(many))
    write_file(folder / SIDECAR, seal([asdict(header), facts, *map(asdict, many)]))
    _link(source, folder, f"{lines[0].shard}.tar")
    if header.empty_sha256 is not None:
        _link(source, folder, sidecar_files.EMPTY_TEXT)


def _quarantine(folder: Path, samples: int) -> int:
    """Gives some rows, evenly spread, keys of their own that are in quarantine; how many."""
    count = min(QUARANTINED, samples // 2)
    keys = [f"left_out_{number}" for number in range(count)]
    tables = [(folder, ROW), *((folder / kind, sidecar_files.ROW) for kind in NOISE_KINDS)]
    for at, row_type in tables:
        rows = np.memmap(at / ROWS, row_type, "r+")
        for key, row in zip(keys, rows[:: samples // count], strict=False):
            row["key"] = key.encode()
            row["row_crc32"] = zlib.crc32(row.tobytes()[:-4])
        rows.flush()
    write_quarantine(folder, [QuarantineEntry(key, "manual", "") for key in keys])
    return count


def _link(source: Path, folder: Path, name: str) -> None:
    (folder / name).symlink_to((source / name).resolve())
