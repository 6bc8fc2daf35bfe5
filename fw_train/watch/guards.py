"""What judges steps and weights: spikes of the loss, slow ranks, and fingerprints that show whether weights are the same."""

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median, median_low
from typing import Any, NamedTuple

import torch
from torch import Tensor

NORMAL = 1.4826  # standard deviations in a median absolute deviation of normal noise
LEAST_LOSSES = 20  # before them the guard cannot know what is usual
LEAST_DEVIATION = 0.01  # of the median: a flat window would make every ripple a spike

SLOW_FACTOR = 1.3
SLOW_STEPS = 20  # a rank's pace is its median over so many steps: ten slow ones show, a few stalls do not
SLOW_LEAST_S = 0.05  # shorter delays are the noise of short steps
SLOW_AGAIN_STEPS = 100

CHUNK = 2**18  # elements at a time: temporaries of a few megabytes, which processors keep in their caches
LARGEST_ELEMENT = 16  # bytes


class SpikeGuard:
    """Finds losses far above the recent ones; hand it the loss of the whole step, so that all ranks judge alike."""

    def __init__(self, window: int, deviations: float, max_bad: int) -> None:
        """`deviations`: how many robust standard deviations above the median are too many; 0: only finite counts."""
        self.deviations, self.max_bad = deviations, max_bad
        self.bad = 0  # bad steps in a row
        self._bad_before = 0
        self._losses: deque[float] = deque(maxlen=window)

    def judge(self, loss: float) -> str:
        """Empty for a good step, which joins the window; else what is wrong with it, with the numbers."""
        problem, self._bad_before = self._problem(loss), self.bad
        if problem:
            self.bad += 1
        else:
            self.bad = 0
            self._losses.append(loss)
        return problem

    def overrule(self, problem: str) -> str:
        """Makes the step that was judged last a bad one after all, for what showed only later, and returns the problem."""
        self._losses.pop()
        self.bad = self._bad_before + 1
        return problem

    @property
    def too_many(self) -> bool:
        return self.bad >= self.max_bad

    def state(self) -> dict[str, Any]:
        """For the checkpoint; JSON keeps every bit of it."""
        return {"losses": list(self._losses), "bad": self.bad}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(float(loss) for loss in state["losses"])
        self.bad = int(state["bad"])

    def _problem(self, loss: float) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.deviations == 0 or len(self._losses) < min(LEAST_LOSSES, self._losses.maxlen or LEAST_LOSSES):
            return ""
        middle = median(self._losses)
        spread = NORMAL * median(abs(value - middle) for value in self._losses)
        spread = max(spread, LEAST_DEVIATION * abs(middle))
        if loss <= middle + self.deviations * spread:
            return ""
        return (
            f"the loss {loss:.6g} lies above {middle:.6g} + {self.deviations:g} x {spread:.3g}, the median and robust "
            f"deviation of the last {len(self._losses)} steps"
        )


class Slow(NamedTuple):
    rank: int
    seconds: float  # its median own time of a step
    usual: float  # the median over the ranks

    def __str__(self) -> str:
        return f"rank {self.rank} is slow: {self.seconds:.3g} s of its own a step, {self.usual:.3g} s is usual"


class Stragglers:
    """Finds ranks that are slower than the others, by the time each spends on its own work and not waiting for others."""

    def __init__(self, ranks: int) -> None:
        self._seconds = [deque[float](maxlen=SLOW_STEPS) for _ in range(ranks)]
        self._named = [-SLOW_AGAIN_STEPS] * ranks

    def add(self, step: int, seconds: Sequence[float]) -> list[Slow]:
        """Takes the own time of each rank in one step; names those that have become slow, each at most once in 100 steps."""
        for times, own in zip(self._seconds, seconds, strict=True):
            times.append(own)
        if len(self._seconds[0]) < SLOW_STEPS:
            return []
        paces = [median(times) for times in self._seconds]
        usual = median_low(paces)  # of two ranks the faster one
        limit = max(SLOW_FACTOR * usual, usual + SLOW_LEAST_S)
        slow = [
            Slow(rank, pace, usual)
            for rank, pace in enumerate(paces)
            if pace > limit and step >= self._named[rank] + SLOW_AGAIN_STEPS
        ]
        for found in slow:
            self._named[found.rank] = step
        return slow


@torch.no_grad()
def weights_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and all bits, whatever the order and the devices; only sums leave the device.

    A changed bit, two swapped elements or two swapped tensors always change it.
    """
    factors = {device: _factors(device) for device in {tensor.device for tensor in tensors.values()}}
    # All are queued before the first is waited for.
    sums = {name: list(_sums(tensor, factors[tensor.device])) for name, tensor in tensors.items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        values = torch.stack(sums[name]).tolist() if sums[name] else []
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), values]).encode() + b"\n")
    return digest.hexdigest()


def _factors(device: torch.device) -> Tensor:
    """An odd number for each place of a word in a chunk.

    place * (2 place + 1) takes every value below 2^32 at most once, so two factors differ by less than 2^33, and no
    difference of two 32-bit words times theirs is a multiple of 2^64: no swap leaves the sum as it is.
    """
    place = torch.arange(CHUNK * LARGEST_ELEMENT // 4, dtype=torch.int64, device=device)
    return (place * (2 * place + 1) & 0xFFFFFFFF) * 2 + 1


def _sums(tensor: Tensor, factors: Tensor) -> Iterator[Tensor]:
    """The sum of words times factors, modulo 2^64, of each chunk."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        words = _words(flat[start : start + CHUNK])
        yield words.mul_(factors[: words.numel()]).sum()


def _words(chunk: Tensor) -> Tensor:
    """The bits as 32-bit words, the last one filled with zeros, in an int64 tensor of its own."""
    size = chunk.element_size()
    if chunk.storage_offset() * size % 4:
        chunk = chunk.clone()
    data = chunk.view(torch.uint8)
    if data.numel() % 4:
        data = torch.cat((data, data.new_zeros(-data.numel() % 4)))
    return data.view(torch.int32).long()
