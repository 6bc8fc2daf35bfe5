"""Time, memory and kept activations of a piece of work, on the CPU or a GPU."""

import ctypes
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Timing(NamedTuple):
    median_s: float
    spread_s: float  # half the distance between the quartiles

    def __str__(self) -> str:
        return f"{self.median_s:.3f} s ± {self.spread_s:.3f}"


def alternate(
    work: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, Timing]:
    """Runs every piece of work once per round, in turn: what disturbs the machine disturbs them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(warmup + repeats):
        for name, run in work.items():
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], 0.0)
    quartiles = statistics.quantiles(values, n=4)
    return Timing(statistics.median(values), (quartiles[2] - quartiles[0]) / 2)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that the work needs beyond what is there when it starts; None where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _CLEAR.write_text("5")  # resets the high-water mark of the resident memory
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found.group(1)) * 1024


def keep_freed_memory() -> None:
    """Lets glibc reuse freed memory instead of returning it: page faults would otherwise hide differences on the CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class KeptTensors:
    """Storage that autograd keeps for the backward pass, each counted once, the parameters' own left out."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._storages: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    @contextmanager
    def watch(self) -> Iterator["KeptTensors"]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor
