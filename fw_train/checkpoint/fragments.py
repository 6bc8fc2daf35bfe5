"""One rank's part of a checkpoint: its fragments' master weights and moments in a file, and an index that says what they are.

The data file is a safetensors file of three flat fp32 tensors, each the rank's fragments one after the other. The index lists
the fragments and the SHA-256 of every 4 MiB chunk of the data file, so that a reader verifies exactly what it reads.
"""

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fw_train.checkpoint.layout import Checkpoint, FileRecord, data_name, index_name, is_count, is_digest
from fw_train.data.strict_json import SchemaError, read_json
from fw_train.engine.base import Fragment
from fw_train.weights.files import CheckpointError, listing
from fw_train.weights.safetensors_writing import Described, header, tensor_bytes

DATA_FORMAT = "fw_train.checkpoint_rank.v1"
PARTS = ("master", "exp_avg", "exp_avg_sq")
CHUNK_BYTES = 4 << 20
MAX_INDEX_BYTES = 256 << 20
ITEM_BYTES = 4


class Piece(NamedTuple):
    """A run of a flattened parameter, without its values."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int


class RankIndex(NamedTuple):
    pieces: tuple[Piece, ...]  # in the order of their values in the data file
    chunks: tuple[str, ...]
    size: int  # of the data file
    rng: dict[str, Any]

    @property
    def numel(self) -> int:
        return sum(piece.numel for piece in self.pieces)


class ChunkHasher:
    """SHA-256 of every chunk of a stream of bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._digests: list[str] = []
        self._chunk = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        while len(data):
            room = CHUNK_BYTES - self.size % CHUNK_BYTES
            taken = data[:room]
            self._chunk.update(taken)
            self.size += len(taken)
            if self.size % CHUNK_BYTES == 0:
                self._digests.append(self._chunk.hexdigest())
                self._chunk = hashlib.sha256()
            data = data[room:]

    def digests(self) -> tuple[str, ...]:
        last = [self._chunk.hexdigest()] if self.size % CHUNK_BYTES else []
        return (*self._digests, *last)


def chunks_digest(chunks: Iterable[str]) -> str:
    """The one hash of a data file that the manifest holds."""
    return hashlib.sha256("".join(chunks).encode()).hexdigest()


def checked_pieces(fragments: Sequence[Fragment]) -> tuple[Piece, ...]:
    """The fragments without their values; an error where a view is not what it says."""
    wrong = [
        f"{f.name}@{f.start} {part} {tensor.dtype} {list(tensor.shape)}"
        for f in fragments
        for part, tensor in zip(PARTS, (f.master, f.exp_avg, f.exp_avg_sq), strict=True)
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != (f.numel,)
    ]
    if wrong:
        raise CheckpointError(f"fragments must be one-dimensional fp32 of their own length: {listing(wrong)}")
    return tuple(Piece(f.name, tuple(f.shape), f.start, f.numel) for f in fragments)


def data_header(numel: int) -> bytes:
    """The first bytes of the data file of a rank that owns so many elements."""
    return header({part: Described(torch.float32, (numel,)) for part in PARTS}, {"format": DATA_FORMAT})


def data_size(numel: int) -> int:
    return len(data_header(numel)) + len(PARTS) * ITEM_BYTES * numel


def index_bytes(index: RankIndex) -> bytes:
    tree = {
        "format": DATA_FORMAT,
        "size": index.size,
        "chunk_bytes": CHUNK_BYTES,
        "chunks": index.chunks,
        "pieces": index.pieces,
        "rng": index.rng,
    }
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()


def read_index(checkpoint: Checkpoint, rank: int) -> RankIndex:
    """The index of a saved rank, checked against the manifest."""
    data_record, record = checkpoint.manifest.files[2 * rank : 2 * rank + 2]
    path = checkpoint.path / index_name(rank)
    index = parse_index(read_verified(path, record), path)
    if index.size != data_record.size or chunks_digest(index.chunks) != data_record.sha256:
        raise CheckpointError(f"{path} and the manifest beside it disagree about {data_name(rank)}")
    return index


def read_verified(path: Path, record: FileRecord) -> bytes:
    """A small file whole, if it holds what was committed."""
    if record.size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path} has {record.size} bytes; an index has at most {MAX_INDEX_BYTES}")
    try:
        with open(path, "rb") as file:
            data = file.read(record.size + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
        raise CheckpointError(
            f"{path} is damaged: its {len(data)} bytes are not the {record.size} that were committed (SHA-256 differs)"
        )
    return data


def parse_index(data: bytes, path: Path) -> RankIndex:
    """An index as it was written; whatever else it might be is an error before anything is allocated."""
    try:
        tree = read_json(data, "it")
        if set(tree) != {"format", "size", "chunk_bytes", "chunks", "pieces", "rng"} or tree["format"] != DATA_FORMAT:
            raise SchemaError(f"this is not {DATA_FORMAT}")
        pieces = tuple(_piece(entry) for entry in tree["pieces"])
        index = RankIndex(pieces, tuple(tree["chunks"]), tree["size"], tree["rng"])
        if not is_count(index.size) or index.size != data_size(index.numel):
            raise SchemaError(f"{index.numel} elements do not make a data file of {index.size!r:.40} bytes")
        if tree["chunk_bytes"] != CHUNK_BYTES or len(index.chunks) != math.ceil(index.size / CHUNK_BYTES):
            raise SchemaError(f"{len(index.chunks)} chunks do not make up {index.size} bytes")
        if not all(map(is_digest, index.chunks)) or not isinstance(index.rng, dict):
            raise SchemaError("a chunk's hash or the random state makes no sense")
    except (SchemaError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return index


def _piece(entry: Any) -> Piece:
    name, shape, start, numel = entry
    sizes = [*shape, start, numel]
    if not isinstance(name, str) or not all(map(is_count, sizes)) or start + numel > math.prod(shape):
        raise SchemaError(f"{entry!r:.160} is no piece of a parameter")
    return Piece(name, tuple(shape), start, numel)


def coverage_problems(pieces: Iterable[Piece]) -> list[str]:
    """Whether the pieces hold every element of their parameters exactly once; what is wrong, by parameter."""
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_name.setdefault(piece.name, []).append(piece)
    problems = []
    for name, parts in by_name.items():
        shapes = {part.shape for part in parts}
        if len(shapes) > 1:
            problems.append(f"{name} has the shapes {' and '.join(str(list(shape)) for shape in sorted(shapes))}")
            continue
        end = 0
        for start, numel in sorted((part.start, part.numel) for part in parts if part.numel):
            if start != end:
                what = f"elements {end} to {start} are missing" if start > end else f"element {start} is held twice"
                problems.append(f"{name}: {what}")
                break
            end = start + numel
        else:
            if end != math.prod(parts[0].shape):
                problems.append(f"{name}: elements {end} to {math.prod(parts[0].shape)} are missing")
    return problems


class Run(NamedTuple):
    """Elements that lie together in a data file and in a fragment of this rank."""

    saved_rank: int
    offset: int  # in each of the data file's tensors
    fragment: int
    start: int  # in the fragment
    numel: int


def plan_reads(saved: Sequence[RankIndex], wanted: Sequence[Piece]) -> list[Run]:
    """Which elements of which saved rank's file fill the wanted pieces, in the order of the files."""
    places: dict[str, list[tuple[int, int, int, int]]] = {}  # name -> (start, numel, rank, offset), by start
    for rank, index in enumerate(saved):
        offsets = accumulate((piece.numel for piece in index.pieces), initial=0)
        for piece, offset in zip(index.pieces, offsets, strict=False):
            if piece.numel:
                places.setdefault(piece.name, []).append((piece.start, piece.numel, rank, offset))
    for held in places.values():
        held.sort()
    runs = []
    for number, piece in enumerate(wanted):
        held = places.get(piece.name, [])
        position, end = piece.start, piece.start + piece.numel
        at = bisect_right(held, (position, math.inf)) - 1
        while position < end:
            start, numel, rank, offset = held[at]
            stop = min(end, start + numel)
            runs.append(Run(rank, offset + position - start, number, position - piece.start, stop - position))
            position, at = stop, at + 1
    return sorted(runs)


def fill(
    checkpoint: Checkpoint, saved: Sequence[RankIndex], fragments: Sequence[Fragment], runs: Sequence[Run]
) -> None:
    """Overwrites the views; each chunk that is read is verified before anything of it is used."""
    for rank in sorted({run.saved_rank for run in runs}):
        index = saved[rank]
        here = [run for run in runs if run.saved_rank == rank]
        path = checkpoint.path / data_name(rank)
        prefix = data_header(index.numel)
        with open(path, "rb", buffering=0) as file:
            reader = ChunkReader(path, file.fileno(), index)
            for number, part in enumerate(PARTS):
                base = len(prefix) + number * ITEM_BYTES * index.numel
                for run in here:
                    view = getattr(fragments[run.fragment], part).detach()[run.start : run.start + run.numel]
                    _copy(reader, base + ITEM_BYTES * run.offset, view)


def _copy(reader: "ChunkReader", offset: int, view: Tensor) -> None:
    whole = memoryview(bytearray(ITEM_BYTES * view.numel())) if view.device.type != "cpu" else None
    staged = torch.frombuffer(whole, dtype=torch.float32) if whole else view
    target = whole if whole is not None else tensor_bytes(view)
    for begin, data in reader.read(offset, len(target)):
        target[begin : begin + len(data)] = data
    if staged is not view:
        view.copy_(staged)


class ChunkReader:
    """Reads ranges of a data file through verified chunks; keeps the last chunk, as ranges follow each other."""

    def __init__(self, path: Path, descriptor: int, index: RankIndex) -> None:
        self._path, self._descriptor, self._index = path, descriptor, index
        self._number, self._chunk = -1, memoryview(b"")

    def read(self, offset: int, size: int) -> Iterator[tuple[int, memoryview]]:
        """(position in the range, bytes) in order."""
        done = 0
        while done < size:
            number, within = divmod(offset + done, CHUNK_BYTES)
            data = self.chunk(number)[within : within + size - done]
            yield done, data
            done += len(data)

    def chunk(self, number: int) -> memoryview:
        if number != self._number:
            begin = number * CHUNK_BYTES
            expected = min(CHUNK_BYTES, self._index.size - begin)
            data = b""
            while len(data) < expected:
                piece = os.pread(self._descriptor, expected - len(data), begin + len(data))
                if not piece:
                    break
                data += piece
            if hashlib.sha256(data).hexdigest() != self._index.chunks[number]:
                raise CheckpointError(
                    f"{self._path} is damaged in the bytes {begin} to {begin + expected} (SHA-256 differs)"
                )
            self._number, self._chunk = number, memoryview(data)
        return self._chunk


def damaged_ranges(checkpoint: Checkpoint, rank: int) -> list[str]:
    """Reads a rank's whole data file; every damaged chunk by its byte range."""
    index = read_index(checkpoint, rank)
    path = checkpoint.path / data_name(rank)
    problems = []
    with open(path, "rb", buffering=0) as file:
        reader = ChunkReader(path, file.fileno(), index)
        for number in range(len(index.chunks)):
            try:
                reader.chunk(number)
            except CheckpointError as error:
                problems.append(str(error))
    return problems


def mismatches(saved: Iterable[Piece], live: Iterable[Piece]) -> list[str]:
    """How the parameters of a checkpoint differ from those of the network in training."""
    there: Mapping[str, tuple[int, ...]] = {piece.name: piece.shape for piece in saved}
    here: Mapping[str, tuple[int, ...]] = {piece.name: piece.shape for piece in live}
    lists = {
        "missing in the checkpoint": [name for name in here if name not in there],
        "unknown to the network": [name for name in there if name not in here],
        "of another shape": [
            f"{name} {list(there[name])}, expected {list(here[name])}"
            for name in here
            if name in there and there[name] != here[name]
        ],
    }
    return [f"{what}: {listing(names)}" for what, names in lists.items() if names]
