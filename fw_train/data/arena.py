"""Shared memory in which loader processes hand over batches; it is used again and again, and only ever read by the trainer.

A DataLoader's own way opens a file, a socket and fresh pages for every tensor. Here a process writes into a slot of one
mapped file that it was given with the request, and sends no more than places. A slot is free again when the last tensor on it
is gone: whoever keeps a batch keeps its numbers. Without a free slot the numbers travel with the message.
"""

import mmap
import os
import weakref
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 64
NO_SLOT = -1


class Placed(NamedTuple):
    """A tensor in a slot."""

    offset: int  # from the start of the slot
    dtype: torch.dtype
    shape: tuple[int, ...]


class Carried(NamedTuple):
    """A tensor in the message itself."""

    data: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]


class Arena:
    """Slots of `slot_bytes`; memory is taken only where it is written to."""

    def __init__(self, slots: int, slot_bytes: int, descriptor: int | None = None) -> None:
        self.slots, self.slot_bytes = slots, -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # Not a file under /dev/shm, which is small in containers.
        self._descriptor = os.memfd_create("fw-loader") if descriptor is None else descriptor
        os.ftruncate(self._descriptor, slots * self.slot_bytes)
        self._memory = np.frombuffer(mmap.mmap(self._descriptor, slots * self.slot_bytes), np.uint8)
        self._free = list(range(slots))

    def take(self) -> int:
        """The number of a slot, the one that was free last for its pages are there; NO_SLOT if all are in use."""
        return self._free.pop() if self._free else NO_SLOT

    def lease(self, slot: int) -> Tensor:
        """The bytes of a slot; it is free again when no tensor shares this storage any more."""
        memory = self._slot(slot)
        weakref.finalize(memory, self._free.append, slot)
        return torch.from_numpy(memory)  # holds the array as long as its storage lives

    def writer(self, slot: int) -> "SlotWriter":
        """What a process fills the slot with."""
        return SlotWriter(np.empty(0, np.uint8) if slot == NO_SLOT else self._slot(slot))

    def _slot(self, slot: int) -> NDArray[np.uint8]:
        return self._memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def __del__(self) -> None:
        os.close(self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:  # while a process is started
        return _same_arena, (self.slots, self.slot_bytes, DupFd(self._descriptor))


class SlotWriter:
    """Allocates one array behind the other in a slot."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory, self.used = memory, 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """As `np.empty`, in the slot while it has room."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if size == 0 or self.used + size > len(self._memory):
            return np.empty(shape, dtype)
        array = self._memory[self.used : self.used + size].view(dtype).reshape(shape)
        self.used += -(-size // ALIGNMENT) * ALIGNMENT
        return array

    def place(self, tensor: Tensor) -> Placed | Carried:
        """Where the trainer finds the tensor, which is copied unless it lies in the slot already."""
        tensor = tensor.contiguous()
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        offset = tensor.data_ptr() - self._memory.ctypes.data
        if not (offset >= 0 and offset + len(flat) <= len(self._memory)):
            copy = self.empty(flat.shape, np.uint8)
            offset = copy.ctypes.data - self._memory.ctypes.data
            if not len(flat) or not (0 <= offset < len(self._memory)):
                return Carried(flat.tobytes(), tensor.dtype, tuple(tensor.shape))
            copy[:] = flat
        return Placed(offset, tensor.dtype, tuple(tensor.shape))


def restore(place: Placed | Carried, slot: Tensor | None) -> Tensor:
    """The tensor, on the leased slot or in memory of its own."""
    if isinstance(place, Carried):
        data = (
            torch.frombuffer(bytearray(place.data), dtype=torch.uint8)
            if place.data
            else torch.empty(0, dtype=torch.uint8)
        )
        return data.view(place.dtype).reshape(place.shape)
    if slot is None:
        raise AssertionError("a batch without a slot has no places in it")
    size = int(np.prod(place.shape, dtype=np.int64)) * place.dtype.itemsize
    return slot[place.offset : place.offset + size].view(place.dtype).reshape(place.shape)


def _same_arena(slots: int, slot_bytes: int, descriptor: Any) -> Arena:
    return Arena(slots, slot_bytes, descriptor.detach())
