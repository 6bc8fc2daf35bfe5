"""Reading checkpoints, one tensor at a time: safetensors files, sharded ones, and torch files without their pickles.

Opening reads headers alone, and everything that can be wrong with them is an error there, before anything large is allocated.
"""

import itertools
import json
import logging
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

log = logging.getLogger(__name__)

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model", "module")  # under which training programs store the weights in a torch file
MAX_JSON_BYTES = 100_000_000  # of a safetensors header (that format's own limit) and of an index

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class CheckpointError(ValueError):
    """Weights that cannot be used; the message says which file, what is wrong and what to do."""


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tuple(tensor.shape), tensor.dtype)


class FileStamp(NamedTuple):
    """Tells whether a file is still the one that was opened."""

    path: str  # without symbolic links
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        status = path.stat()
        return cls(os.path.realpath(path), status.st_size, status.st_mtime_ns)


class Entry(NamedTuple):
    info: TensorInfo
    read: Callable[[], Tensor]


class CheckpointReader:
    """An open checkpoint: names, shapes and dtypes are known, tensors are read when asked for."""

    def __init__(
        self, path: Path, files: Iterable[FileStamp], metadata: Mapping[str, str], entries: Mapping[str, Entry]
    ) -> None:
        self.path = path
        self.files = tuple(files)
        self.metadata = dict(metadata)
        self._entries = dict(entries)

    def shapes(self) -> dict[str, TensorInfo]:
        """Shape and dtype of every tensor."""
        return {key: entry.info for key, entry in self._entries.items()}

    def tensor(self, key: str) -> Tensor:
        """A contiguous tensor on the CPU in memory of its own: later changes of the file do not reach it."""
        if key not in self._entries:
            raise CheckpointError(f"{self.path} holds no tensor `{key}`")
        return self._entries[key].read()


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Opens a safetensors file, the index of sharded ones, a torch file, or a folder with one of the first two.

    In a folder an index comes first, then a diffusers-named file, then the only safetensors file, then `transformer/`.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}: there is no such file or folder")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch(path)
    raise CheckpointError(
        f"{path} is none of *.safetensors, *.index.json, {', '.join('*' + suffix for suffix in TORCH_SUFFIXES)}"
    )


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The count of the names, and the first of them."""
    names = list(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} ({', '.join(names[:limit])}{more})"


def _in_folder(folder: Path) -> Path:
    patterns = ("*.safetensors.index.json", "diffusion_pytorch_model*.safetensors", "*.safetensors")
    for place, pattern in itertools.product((folder, folder / "transformer"), patterns):
        found = sorted(place.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            split = all(re.search(r"-\d+-of-\d+\.safetensors$", file.name) for file in found)
            remedy = (
                "they look like shards, and their *.safetensors.index.json is missing; fetch it too"
                if split
                else "name the one that is meant"
            )
            raise CheckpointError(
                f"{place} holds several checkpoints, {listing(file.name for file in found)}: {remedy}"
            )
    raise CheckpointError(
        f"{folder} holds no *.safetensors and no *.safetensors.index.json, nor does its transformer/; "
        f"name the file itself if it is a {' or '.join(TORCH_SUFFIXES)}"
    )


def _open_safetensors(path: Path) -> CheckpointReader:
    # Read here and not with the format's library, because that maps the whole file: its pages count as the process's
    # memory beside the copy in the model, and a file that shrinks later kills the process.
    stamp = FileStamp.of(path)
    with path.open("rb") as file:
        length_bytes = file.read(8)
        length = int.from_bytes(length_bytes, "little")
        if length_bytes == b"version ":
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull`")
        if len(length_bytes) < 8 or length > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} ({stamp.size} bytes) is not a safetensors file; fetch it again")
        if stamp.size < 8 + length:
            raise CheckpointError(
                f"{path} is truncated: expected at least {8 + length} bytes, found {stamp.size}; fetch it again"
            )
        header = _strict_json(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: `__metadata__` is not a mapping of texts; fetch or make the file again")

    data = 8 + length
    entries, spans = {}, []
    for key, described in header.items():
        info, begin, end = _described(described, f"{path}: tensor `{key}`")
        entries[key] = Entry(info, partial(_read_span, stamp, data + begin, info))
        spans.append((begin, end, key))
    expected = 0
    for begin, end, key in sorted(spans):
        if begin != expected:
            raise CheckpointError(
                f"{path}: the bytes of tensor `{key}` begin at {begin}, where {expected} was expected; fetch it again"
            )
        expected = end
    if stamp.size != data + expected:
        what = "is truncated" if stamp.size < data + expected else "has bytes after its end"
        raise CheckpointError(
            f"{path} {what}: expected {data + expected} bytes, found {stamp.size}; fetch or make it again"
        )
    return CheckpointReader(path, [stamp], metadata, entries)


def _described(described: Any, where: str) -> tuple[TensorInfo, int, int]:
    """Shape, dtype and place of a tensor, from its entry in a safetensors header."""
    try:
        name, shape, (begin, end) = described["dtype"], described["shape"], described["data_offsets"]
        sizes, known = [*shape, begin, end], name in SAFETENSORS_DTYPES
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{where} is not described by dtype, shape and data_offsets; fetch the file again"
        ) from None
    if not known:
        raise CheckpointError(f"{where} has the dtype {name!r}; known are {', '.join(SAFETENSORS_DTYPES)}")
    info = TensorInfo(tuple(shape), SAFETENSORS_DTYPES[name])
    if not all(type(size) is int and size >= 0 for size in sizes) or end - begin != _bytes(info):
        raise CheckpointError(
            f"{where}: {name} of shape {list(shape)} does not fill the bytes {begin} to {end}; fetch the file again"
        )
    return info, begin, end


def _read_span(stamp: FileStamp, offset: int, info: TensorInfo) -> Tensor:
    raw = torch.empty(_bytes(info), dtype=torch.uint8)
    with open(stamp.path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
            raise CheckpointError(f"{stamp.path} has changed while it was being read; start again")
        file.seek(offset)
        view = memoryview(raw.numpy().data)
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{stamp.path} ended while it was being read; fetch it again")
            view = view[count:]
    return raw.view(info.dtype).reshape(info.shape)


def _open_index(path: Path) -> CheckpointReader:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes, too many for an index of shards")
    stamp = FileStamp.of(path)
    placed = _strict_json(path.read_bytes(), path).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError(f"{path} has no `weight_map` from tensor names to file names; fetch it again")
    names = sorted(set(placed.values()))
    outside = [name for name in names if not _is_plain_shard_name(name)]
    if outside:
        raise CheckpointError(
            f"{path} refers to {listing(map(repr, outside))}: shards are *.safetensors files beside the index"
        )
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{path}: shards are missing: {listing(missing)}; fetch them into {path.parent}")

    shards = {name: _open_safetensors(path.parent / name) for name in names}
    holders: dict[str, list[str]] = {}
    for name, shard in shards.items():
        for key in shard.shapes():
            holders.setdefault(key, []).append(name)
    repeated = [f"{key} in {' and '.join(held)}" for key, held in holders.items() if len(held) > 1]
    absent = [f"{key} in {name}" for key, name in placed.items() if key not in shards[name].shapes()]
    unlisted = [f"{key} in {held[0]}" for key, held in holders.items() if key not in placed]
    problems = {
        "held by more than one shard": repeated,
        "named by the index but not in that shard": absent,
        "in a shard but not in the index": unlisted,
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {listing(keys)}" for what, keys in problems.items() if keys)
        raise CheckpointError(f"{path} and its shards do not belong together: {text}; fetch all of them again")
    return CheckpointReader(
        path,
        [stamp, *(file for shard in shards.values() for file in shard.files)],
        shards[names[0]].metadata,
        {key: shards[name]._entries[key] for key, name in placed.items()},
    )


def _is_plain_shard_name(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".") and not set(name) & set("/\\\0")


def _open_torch(path: Path) -> CheckpointReader:
    stamp = FileStamp.of(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{path} is refused: it holds {f'`{named[1]}`, ' if named else ''}more than tensors, and reading that could "
            "run code; take a safetensors file, or have its author save the plain state dict"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if "mmap can only be used" in str(error):
            reason = "it is not in torch's zip format; save the state dict again with torch 1.6 or newer"
        else:
            reason = f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; fetch it again"
        raise CheckpointError(f"{path} ({stamp.size} bytes) is not readable: {reason}") from None

    if isinstance(loaded, Mapping):
        wrapped = [name for name in WRAPPERS if isinstance(loaded.get(name), Mapping)]
        if len(wrapped) > 1:
            raise CheckpointError(f"{path} holds {' and '.join(wrapped)}; save the one that is meant by itself")
        if wrapped:
            beside = [str(key) for key in loaded if key != wrapped[0]]
            log.info("%s: reading `%s`%s", path, wrapped[0], f", not {listing(beside)}" if beside else "")
            loaded = loaded[wrapped[0]]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a mapping of names to tensors")
    strays = [f"{key} ({type(value).__name__})" for key, value in loaded.items() if not _is_plain_tensor(key, value)]
    if strays:
        raise CheckpointError(
            f"{path} holds entries that are not named dense tensors: {listing(strays)}; save the state dict by itself"
        )
    entries = {key: Entry(TensorInfo.of(tensor), partial(_copied, tensor)) for key, tensor in loaded.items()}
    return CheckpointReader(path, [stamp], {}, entries)


def _copied(mapped: Tensor) -> Tensor:
    return mapped.detach().clone(memory_format=torch.contiguous_format)


def _is_plain_tensor(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not isinstance(value, Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _strict_json(text: bytes, where: Path) -> dict[str, Any]:
    """A JSON object in which no name is given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            raise CheckpointError(f"{where}: given twice: {listing(twice)}; fetch or make the file again")
        return tree

    try:
        tree = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError):
        raise CheckpointError(f"{where} is damaged: its JSON is not readable; fetch it again") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{where} is damaged: its JSON is not an object; fetch it again")
    return tree
