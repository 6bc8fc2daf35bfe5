"""Measure the loader: samples a second, where the time goes, memory, and how long opening takes.

    fw bench data packed/ --raw raw/ --workers 0 1 2        # against npy folders and plain webdataset on the same tars
    fw bench data packed/ --raw raw/ --cold                 # with the files thrown out of the page cache all along
    fw bench data packed/ --latents                         # latents and texts of noise, as stage 2 reads them
    fw bench data packed/ --memory 5000 --plot memory.png   # resident memory of all processes over that many samples
    fw bench data packed/ --open 1000000                    # a generated table of that many samples, with sidecars and quarantine

Loaders take turns, `--repeats` times; medians count. What a loader gives is copied once, as pinning would. MB/s are the bytes
that are read from files. CPU ms are the processor time of all processes for a sample: what a busy machine does not distort.
The clips of OUT are used over and over: a few are enough.
"""

import argparse
import multiprocessing
import os
import pickle
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_tools.bench_memory import measure_memory
from data_tools.bench_opening import measure_opening
from data_tools.bench_rivals import npy_batches, tensors_of, webdataset_batches
from data_tools.bench_sidecars import NOISE_KINDS, with_noise_sidecars
from fw_train.data import schema
from fw_train.data.arena import Arena
from fw_train.data.augment import Augmentation, draw_view
from fw_train.data.codec import decode_codes
from fw_train.data.coded import from_slot, to_slot
from fw_train.data.fetch import Fetcher, Request, slot_bytes
from fw_train.data.loader import LoaderParams, SourceParams, TrainingData
from fw_train.data.manifest import Dataset
from fw_train.data.schema import Bucket
from fw_train.data.streams import open_streams
from fw_train.data.video import decode_video

PREFETCH = 2


class Variant(NamedTuple):
    """A loader to measure."""

    name: str
    batches: Callable[[int], Iterator[list[Tensor]]]  # by the number of processes
    bytes_per_sample: float
    files: list[Path]


class Rate(NamedTuple):
    """One turn of a loader."""

    samples_per_s: float
    cpu_ms: float  # of all processes, a sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="packed dataset; its first bucket is used")
    parser.add_argument("--raw", type=Path, help="the folder that it was packed from, to measure npy files")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of processes (0 1 2)")
    parser.add_argument("--samples", type=int, default=12, help="samples that are timed at a time (12)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each loader has its turn (3)")
    parser.add_argument("--cold", action="store_true", help="throw the files out of the page cache all along")
    parser.add_argument("--latents", action="store_true", help="measure latents and texts instead of labels and video")
    parser.add_argument("--memory", type=int, metavar="N", help="measure resident memory over N samples instead")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what --memory measures")
    parser.add_argument("--open", type=int, metavar="N", help="measure opening a table of N samples instead")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    dataset = Dataset(args.out)
    bucket = Bucket.parse(dataset.buckets[0].bucket)
    print(f"{bucket}, {dataset.buckets[0].samples} clips; load of the machine before: {os.getloadavg()[0]:.1f}")
    if args.open:
        measure_opening(args.out, args.open, args.workers)
        return 0
    if args.memory:
        measure_memory(args.out, _params(bucket, max(args.workers)), args.memory, args.plot)
        return 0
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        variants = [_latents(args.out, Path(folder))] if args.latents else _variants(args.out, args.raw)
        _compare(variants, args)
    if not args.latents:
        _breakdown(args.out, bucket)
    return 0


def _compare(variants: list[Variant], args: argparse.Namespace) -> None:
    """Prints a row for each loader and number of processes."""
    found: dict[tuple[str, int], list[Rate]] = {}
    for _ in range(args.repeats):
        for workers in args.workers:
            for variant in variants:
                with _thrown_out(variant.files) if args.cold else _left_alone():
                    found.setdefault((variant.name, workers), []).append(_rate(variant, workers, args.samples))
    print(
        f"\n| loader{', cold' if args.cold else ''} | processes | samples/s | spread | MB/s | CPU ms | against the first |"
    )
    print("|---|---|---|---|---|---|---|")
    for variant in variants:
        for workers in args.workers:
            turns = found[variant.name, workers]
            rates = [turn.samples_per_s for turn in turns]
            rate, cpu_ms = statistics.median(rates), statistics.median(turn.cpu_ms for turn in turns)
            # Turn by turn: a machine that others use is slow for both.
            both = zip(found[variants[0].name, workers], turns, strict=True)
            ratio = statistics.median(first.samples_per_s / other.samples_per_s for first, other in both)
            spread = f"{min(rates):.2f}-{max(rates):.2f}"
            megabytes = rate * variant.bytes_per_sample / 1e6
            print(
                f"| {variant.name} | {workers} | {rate:.2f} | {spread} | {megabytes:.0f} | {cpu_ms:.0f} | {ratio:.2f}x |"
            )


def _rate(variant: Variant, workers: int, samples: int) -> Rate:
    """Measured from the arrival of the first sample on."""
    batches = variant.batches(workers)
    staging = torch.empty(0, dtype=torch.uint8)
    staging = _copy(next(batches), staging)
    start, start_cpu = time.perf_counter(), _cpu_seconds()
    for tensors in islice(batches, samples):
        staging = _copy(tensors, staging)
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - start_cpu
    del batches
    return Rate(samples / seconds, 1e3 * cpu / samples)


def _cpu_seconds() -> float:
    """Processor time that this process and its loader processes have used."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        user, system = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def _copy(tensors: list[Tensor], staging: Tensor) -> Tensor:
    """Reads every number once, as copying to pinned memory does."""
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    needed = sum(len(part) for part in flat)
    if len(staging) < needed:
        staging = torch.empty(needed, dtype=torch.uint8)
    at = 0
    for part in flat:
        staging[at : at + len(part)].copy_(part)
        at += len(part)
    return staging


def _variants(out: Path, raw: Path | None) -> list[Variant]:
    dataset = Dataset(out)
    rows = range(dataset.buckets[0].first, dataset.buckets[0].first + dataset.buckets[0].samples)
    samples = [dataset.sample(row) for row in rows]
    bucket = Bucket.parse(dataset.buckets[0].bucket)
    shards = sorted({sample.shard for sample in samples})
    tars = [out / f"{shard}.tar" for shard in shards]
    packed = sum(member.size for sample in samples for member in sample.members.values()) / len(samples)
    variants = [
        Variant("this loader", lambda workers: _ours(out, _params(bucket, workers)), packed, tars),
        Variant(
            "webdataset, same tars",
            lambda workers: webdataset_batches(out, shards, bucket.frames, workers, PREFETCH),
            packed,
            tars,
        ),
    ]
    if raw is not None:
        keys = [sample.key for sample in samples]
        files = [path for key in keys for kind in ("depth", "points") for path in (raw / kind / key).iterdir()]
        files += [schema.video_path(raw, key) for key in keys] + [schema.camera_path(raw, key) for key in keys]
        size = sum(path.stat().st_size for path in files) / len(keys)
        variants.append(
            Variant(
                "npy folders", lambda workers: npy_batches(raw, keys, bucket.frames, workers, PREFETCH), size, files
            )
        )
    return variants


def _params(bucket: Bucket, workers: int) -> LoaderParams:
    size = bucket.height, bucket.width
    return LoaderParams(bucket.frames, (size,), "online", (), video=True, workers=workers, prefetch=PREFETCH)


def _ours(out: Path, params: LoaderParams) -> Iterator[list[Tensor]]:
    data = TrainingData([SourceParams(str(out))], params, seed=0)
    for batch in data.batches([(0, 1)], 0, 10**9, rank=0, world=1, micro_batch=1):
        yield tensors_of(batch.samples)


def _latents(out: Path, folder: Path) -> Variant:
    """Our loader on latents and texts of noise."""
    dataset = with_noise_sidecars(out, folder)
    bucket = Bucket.parse(dataset.buckets[0].bucket)
    tars = [path for kind in NOISE_KINDS for path in (folder / kind).glob("*.tar")]

    def batches(workers: int) -> Iterator[list[Tensor]]:
        size = bucket.height, bucket.width
        params = LoaderParams(
            bucket.frames, (size,), "sidecar", NOISE_KINDS, labels=False, workers=workers, prefetch=PREFETCH
        )
        return _ours(folder, params)

    return Variant("latents and texts", batches, sum(path.stat().st_size for path in tars) / len(dataset), tars)


def _breakdown(out: Path, bucket: Bucket) -> None:
    """Prints where the time of one process goes, in milliseconds a sample."""
    params = _params(bucket, 0)
    opened = open_streams([SourceParams(str(out))], params)
    dataset, fetcher = opened.sources[0].dataset, Fetcher(opened, params, 0)
    arena = Arena(1, slot_bytes(opened, params, 1))
    spent: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start, start_cpu = time.perf_counter(), time.process_time()
        yield
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        spent.setdefault(name, []).append((1e3 * seconds, 1e3 * cpu))

    staging = torch.empty(0, dtype=torch.uint8)
    for number in range(9):
        row = opened.rows[0].rows.first + number % opened.rows[0].rows.samples
        view = draw_view(bucket, bucket.frames, (bucket.height, bucket.width), Augmentation(), 0, number)
        with timed("read and check"):
            members = dataset.read(row)
        writer = arena.writer(0)
        with timed("video"):
            decode_video(members[schema.VIDEO], view.frames, empty=writer.empty)
        with timed("entropy, depth"):
            decode_codes(members[schema.DEPTH], view.frames, writer.empty)
        with timed("entropy, points"):
            decode_codes(members[schema.POINTS], view.frames, writer.empty)
        writer = arena.writer(0)
        with timed("all of it in a process"):
            batch = fetcher.fetch(Request(0, 0, 0, (row,), (number,)), writer)
        with timed("hand-over"):
            got = from_slot(pickle.loads(pickle.dumps(to_slot(batch, 0, writer))), arena)
        with timed("copy to staging"):
            staging = _copy(tensors_of(got.samples), staging)
    print("\n| one process | ms a sample | CPU ms |\n|---|---|---|")
    for name, values in spent.items():
        seconds, cpu = (statistics.median(column) for column in zip(*values[1:], strict=True))
        print(f"| {name} | {seconds:.1f} | {cpu:.1f} |")


@contextmanager
def _thrown_out(files: list[Path]) -> Iterator[None]:
    """Keeps files out of the page cache while something reads them."""
    done = threading.Event()
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    for descriptor in descriptors:
        os.fsync(descriptor)  # pages that are not written yet stay

    def throw() -> None:
        while True:
            for descriptor in descriptors:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if done.wait(0.1):
                return

    thread = threading.Thread(target=throw)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def _left_alone() -> Iterator[None]:
    yield
