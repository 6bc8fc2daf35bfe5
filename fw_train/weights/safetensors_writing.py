"""Safetensors written in one pass and in pieces, so that hashes are taken while writing and no second copy is made.

The format's own library serialises in one call that holds Python's lock: training would stand still meanwhile.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PIECE_BYTES = 4 << 20
ALIGNMENT = 8  # of the data, by the format

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Described(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


def header(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> bytes:
    """Everything that precedes the data, which follows in the order of `tensors` without gaps."""
    tree: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + dtype.itemsize * math.prod(shape)
        tree[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    write: Callable[[memoryview], object], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> int:
    """Hands the bytes of a file to `write`, at most 4 MiB at a time; returns their number."""
    described = {name: Described(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_streamed(write, described, tensors.values(), metadata)


def write_streamed(
    write: Callable[[memoryview], object],
    described: Mapping[str, Described],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> int:
    """The same for tensors that come one by one, in the order in which they are described."""
    start = header(described, metadata)
    write(memoryview(start))
    total = len(start)
    for tensor in tensors:
        data = tensor_bytes(tensor.detach().contiguous().cpu())
        for offset in range(0, len(data), PIECE_BYTES):
            write(data[offset : offset + PIECE_BYTES])
        total += len(data)
        del tensor, data  # before the next one comes
    return total


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; writing to it changes the tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data.cast("B")
