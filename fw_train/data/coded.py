"""Batches as loader processes hand them over: compact, on the CPU, to be expanded on the device (`expand.py`).

Labels and planes stay apart by sample: joining them would copy a hundred megabytes each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fw_train.data.arena import NO_SLOT, Arena, Carried, Placed, SlotWriter, restore
from fw_train.data.samples import CodedSample


class Substituted(NamedTuple):
    """A sample that could not be read; another of its stream stands in its place."""

    key: str
    reason: str


@dataclass(frozen=True)
class CodedBatch:
    """The samples of a micro-batch, in the global order."""

    step: int
    micro_step: int
    positions: tuple[int, ...]
    samples: tuple[CodedSample, ...]
    substituted: tuple[Substituted, ...]
    text_tokens: int  # texts are padded to this

    @property
    def position(self) -> Tensor:
        """int64 [B], on the CPU"""
        return torch.tensor(self.positions, dtype=torch.int64)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(sample.key for sample in self.samples)

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(sample.caption for sample in self.samples)

    def pin_memory(self) -> "CodedBatch":
        """The same in pinned memory, from where copies to a GPU need not be waited for."""
        return replace(self, samples=map_values(self.samples, Tensor, Tensor.pin_memory))


class InSlot(NamedTuple):
    """A batch on its way: its tensors are places in a slot."""

    slot: int
    batch: CodedBatch


def to_slot(batch: CodedBatch, slot: int, writer: SlotWriter) -> InSlot:
    """What a loader process sends."""
    return InSlot(slot, replace(batch, samples=map_values(batch.samples, Tensor, writer.place)))


def from_slot(sent: InSlot, arena: Arena) -> CodedBatch:
    """What the trainer gets."""
    lease = None if sent.slot == NO_SLOT else arena.lease(sent.slot)
    samples = map_values(sent.batch.samples, (Placed, Carried), lambda place: restore(place, lease))
    return replace(sent.batch, samples=samples)


def map_values(value: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """The same nested tuples and dictionaries with everything of a kind changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: map_values(item, kind, change) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [map_values(item, kind, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
