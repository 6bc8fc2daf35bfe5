"""The global sample order: which samples each optimiser step trains on, whatever the number of GPUs, workers or restarts.

    order = SampleOrder(seed, [Stream("indoor/336x592x81", size=1_000_000, weight=3.0), ...], segments=[(0, 64)])
    stream, ids, positions = order.step_ids(step)

Samples live in streams (a dataset's samples of one size and length), and a step takes all of its G samples from one stream,
drawn by hash(seed, step) in proportion to the weights. A stream is an endless sequence of passes, each a permutation of its
ids seeded by hash(seed, name, pass); steps consume it gaplessly, so a step may end one pass and begin the next.

Nothing here is stored but `segments`, [(first_step, G), ...]: how far each stream is follows from replaying the draws.
All randomness is integer hashing of its own (blake2b, splitmix64), because NumPy's generators may change between versions.
"""

from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from itertools import accumulate as running_sums
from math import isfinite
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_STEPS = 1 << 14  # draws are replayed this many at a time, and remembered per block


class Stream(NamedTuple):
    """Samples 0..size-1 that may share a batch; `weight` is its share of the steps, relative to the other streams'."""

    name: str  # seeds its permutations: keep it when the data moves, or the order changes
    size: int
    weight: float


class Segment(NamedTuple):
    """From `first_step` until the next segment, steps take `global_batch` samples."""

    first_step: int
    global_batch: int


class StepIds(NamedTuple):
    """The G samples of a step: ids within the stream (its index), and positions in the global sequence of samples."""

    stream: int
    ids: NDArray[np.int64]  # [G]
    positions: NDArray[np.int64]  # [G], never given twice in a run: seeds the noise of a sample


class SampleOrder:
    """A pure function from step to samples; what it caches makes consecutive steps fast and never changes a result."""

    def __init__(self, seed: int, streams: Sequence[Stream], segments: Sequence[Sequence[int]]) -> None:
        self.seed = seed
        self.streams = _checked_streams(streams)
        self.segments = checked_segments(segments)
        # Draws go by name, so that listing the streams in another order changes nothing.
        self._by_name = np.array(sorted(range(len(self.streams)), key=lambda i: self.streams[i].name))
        self._thresholds = _thresholds([self.streams[i].weight for i in self._by_name])
        self._given = [np.zeros(len(self.streams), np.int64)]  # per block: samples each stream gave before it
        self._block = self._draw_block(0)
        self._passes: dict[int, tuple[int, NDArray[np.unsignedinteger]]] = {}  # stream -> (pass, its permutation)

    def step_ids(self, step: int) -> StepIds:
        """The samples of any step; steps are drawn on demand, so a far one costs the replay of all steps before it once."""
        if step < 0:
            raise ValueError(f"step {step} does not exist; steps count from 0")
        number, within = divmod(step, BLOCK_STEPS)
        block = self._replay_to(number)
        stream = int(block.streams[within])
        same_stream = block.streams[:within] == stream
        cursor = int(self._given[number][stream] + block.global_batches[:within][same_stream].sum())
        count = int(block.global_batches[within])
        first_position = self._first_position(step)
        positions = np.arange(first_position, first_position + count, dtype=np.int64)
        return StepIds(stream, self._take(stream, cursor, count), positions)

    def _replay_to(self, number: int) -> "_Block":
        """Block `number`, with `_given` known up to it."""
        while len(self._given) <= number:
            passed = self._draw_block(len(self._given) - 1)
            # Sums of fp64 weights are exact here: they stay far below 2^53.
            taken = np.bincount(passed.streams, weights=passed.global_batches, minlength=len(self.streams))
            self._given.append(self._given[-1] + taken.astype(np.int64))
        if self._block.number != number:
            self._block = self._draw_block(number)
        return self._block

    def _draw_block(self, number: int) -> "_Block":
        first = number * BLOCK_STEPS
        draws = _random64(_key(self.seed, "draws"), first, BLOCK_STEPS) >> np.uint64(1)
        streams = self._by_name[np.searchsorted(self._thresholds, draws, side="right")]
        segment_starts, sizes = np.array(self.segments, dtype=np.int64).T
        steps = np.arange(first, first + BLOCK_STEPS)
        return _Block(number, streams, sizes[np.searchsorted(segment_starts, steps, side="right") - 1])

    def _first_position(self, step: int) -> int:
        """How many samples all steps before `step` take."""
        position = 0
        ends = [segment.first_step for segment in self.segments[1:]] + [step]
        for (first_step, global_batch), end in zip(self.segments, ends, strict=True):
            position += max(0, min(end, step) - first_step) * global_batch
        return position

    def _take(self, stream: int, cursor: int, count: int) -> NDArray[np.int64]:
        """Places cursor..cursor+count-1 of a stream's endless sequence."""
        parts = []
        while count:
            pass_number, start = divmod(cursor, self.streams[stream].size)
            part = self._permutation(stream, pass_number)[start : start + count]
            parts.append(part.astype(np.int64))
            cursor, count = cursor + len(part), count - len(part)
        return np.concatenate(parts)

    def _permutation(self, stream: int, pass_number: int) -> NDArray[np.unsignedinteger]:
        cached = self._passes.get(stream)
        if cached is None or cached[0] != pass_number:
            name, size, _ = self.streams[stream]
            # The hashes of one pass are distinct (see _random64): no tie is left to the sorting algorithm.
            permutation = np.argsort(_random64(_key(self.seed, f"{name}/{pass_number}"), 0, size))
            cached = pass_number, permutation.astype(np.min_scalar_type(size))
            self._passes[stream] = cached  # one pass per stream is kept: 4 bytes a sample
        return cached[1]


def rank_slice(
    global_batch: int, *, rank: int, world: int, micro_batch: int, accumulate: int, micro_step: int
) -> slice:
    """Which of a step's G samples a rank takes at a micro-step: micro-steps are consecutive parts of a rank's run of G / world."""
    fitting = accumulation_steps(global_batch, world, micro_batch)
    if accumulate != fitting:
        raise ValueError(
            f"global_batch {global_batch} is not world {world} x micro_batch {micro_batch} x accumulate {accumulate}; "
            f"accumulate {fitting} fits, or with micro_batch {micro_batch} "
            f"use one of {_fitting_worlds(global_batch, micro_batch)} GPUs"
        )
    for name, value, end in (("rank", rank, world), ("micro_step", micro_step, accumulate)):
        if not 0 <= value < end:
            raise ValueError(
                f"{name} {value} does not exist; with world {world} and accumulate {accumulate} use 0..{end - 1}"
            )
    start = (rank * accumulate + micro_step) * micro_batch
    return slice(start, start + micro_batch)


def accumulation_steps(global_batch: int, world: int, micro_batch: int) -> int:
    """Micro-steps per optimiser step: G / (world x micro_batch), which must be whole."""
    if min(global_batch, world, micro_batch) < 1:
        raise ValueError(
            f"global_batch {global_batch}, world {world} and micro_batch {micro_batch} must all be at least 1"
        )
    if global_batch % micro_batch:
        raise ValueError(
            f"global_batch {global_batch} is not divisible by micro_batch {micro_batch}, so no number of GPUs works; "
            f"use a micro_batch of {_divisors(global_batch)}"
        )
    if global_batch % (world * micro_batch):
        raise ValueError(
            f"global_batch {global_batch} is not divisible by world {world} x micro_batch {micro_batch}; "
            f"with micro_batch {micro_batch} use one of {_fitting_worlds(global_batch, micro_batch)} GPUs"
        )
    return global_batch // (world * micro_batch)


def change_global_batch(segments: Sequence[Sequence[int]], step: int, global_batch: int) -> tuple[Segment, ...]:
    """The segments of a run whose steps before `step` are done and whose later ones take `global_batch` samples."""
    checked = checked_segments(segments)
    if step < checked[-1].first_step:
        raise ValueError(
            f"cannot change the global batch at step {step}: it changed at step {checked[-1].first_step} already; "
            f"use the segments of the checkpoint that is resumed"
        )
    done = tuple(segment for segment in checked if segment.first_step < step)
    if done and done[-1].global_batch == global_batch:
        return done
    return checked_segments([*done, (step, global_batch)])


def checked_segments(segments: Sequence[Sequence[int]]) -> tuple[Segment, ...]:
    """Segments as a configuration or a checkpoint's JSON gives them, or an error that says what is wrong with them."""
    shown = list(segments)
    if not all(isinstance(s, list | tuple) and [type(v) for v in s] == [int, int] for s in shown):
        raise ValueError(f"segments {shown} must be pairs of whole numbers, [(first_step, global_batch), ...]")
    checked = tuple(Segment(*segment) for segment in shown)
    if not checked or checked[0].first_step != 0:
        raise ValueError(f"segments {shown} must begin at step 0; a run of one global batch has [(0, global_batch)]")
    starts = [segment.first_step for segment in checked]
    if starts != sorted(set(starts)):
        raise ValueError(f"segments {shown} must have ascending first steps, each once")
    if min(segment.global_batch for segment in checked) < 1:
        raise ValueError(f"segments {shown} must have global batches of at least 1")
    return checked


class _Block(NamedTuple):
    """BLOCK_STEPS consecutive steps: the stream each one draws and how many samples it takes."""

    number: int
    streams: NDArray[np.intp]
    global_batches: NDArray[np.int64]


def _checked_streams(streams: Sequence[Stream]) -> tuple[Stream, ...]:
    if not streams:
        raise ValueError("there is no stream to draw samples from; give at least one dataset")
    names = [stream.name for stream in streams]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"stream names {repeated} are given more than once, and would get one order; rename them")
    for name, size, weight in streams:
        if size < 1:
            raise ValueError(f"stream {name!r} has {size} samples; pack some, or leave the stream out")
        if not (isfinite(weight) and weight >= 0):
            raise ValueError(f"stream {name!r} has weight {weight}; use a finite number, 0 to leave it out of the mix")
    if not any(stream.weight > 0 for stream in streams):
        raise ValueError(f"the weights of streams {names} are all 0; give at least one a positive weight")
    return tuple(streams)


def _thresholds(weights: Sequence[float]) -> NDArray[np.uint64]:
    """Ends of the streams' shares of [0, 2^63), in exact arithmetic: no machine rounds a draw into another stream."""
    ends = list(running_sums(Fraction(float(weight)) for weight in weights))
    return np.array([int(end * 2**63 / ends[-1]) for end in ends], dtype=np.uint64)


def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def _random64(key: int, first: int, count: int) -> NDArray[np.uint64]:
    """Outputs first..first+count-1 of splitmix64 seeded with `key`, modulo 2^64; distinct, as every operation is invertible."""
    x = np.arange(first + 1, first + 1 + count, dtype=np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(key)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _fitting_worlds(global_batch: int, micro_batch: int) -> list[int]:
    return _divisors(global_batch // micro_batch)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
