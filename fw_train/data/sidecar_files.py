"""The files of a sidecar folder, `OUT/latent` and its like, beside a packed dataset.

    shard-000000.tar          one member for each sample of the dataset's shard of this name, in its order
    shard-000000.index.jsonl  a header, the facts, a line for each sample, a seal
    samples.bin               a row for each row of the dataset's table
    empty.text.safetensors    in OUT/text: what text is replaced by when it is dropped
    sidecar.jsonl             a header, the facts, a line for each shard, a seal; written last

The facts say what made the numbers: encoder, weights, preprocessing. Their hash is the fingerprint.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fw_train.atomic_files import new_file, write_file
from fw_train.data.manifest import ROWS, Manifest, ManifestShard, index_path, seal, unseal
from fw_train.data.schema import KEY_LENGTH, VERSION
from fw_train.data.shards import Member, ShardError, shard_path, sort_key, write_tar
from fw_train.data.sidecar_tensor import suffix_of, tensor_bytes
from fw_train.data.strict_json import SchemaError, read_record

SIDECAR, EMPTY_TEXT = "sidecar.jsonl", "empty.text.safetensors"
REMEDY = "run `fw data encode` again, which restores it"

ROW = np.dtype(
    [
        ("key", f"S{KEY_LENGTH}"),
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc32", "<u4"),
        ("row_crc32", "<u4"),  # of the bytes before it
    ]
)
_ROW_CRC_AT = ROW.itemsize - 4

Facts = Mapping[str, Any]  # plain JSON


class Place(NamedTuple):
    """Where the member of a sample lies in its tar."""

    key: str
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class IndexHeader:
    """The first line of an index; `source_sha256` is of the dataset's tar."""

    schema: int
    shard: str
    member: str  # its suffix
    fingerprint: str
    source_sha256: str
    samples: int
    tar_bytes: int
    tar_sha256: str


class SidecarIndex(NamedTuple):
    header: IndexHeader
    facts: Facts
    places: tuple[Place, ...]


@dataclass(frozen=True)
class SidecarShard:
    """The line of a shard."""

    shard: str
    samples: int
    source_sha256: str
    tar_bytes: int
    tar_sha256: str


@dataclass(frozen=True)
class SidecarHeader:
    """The first line of `sidecar.jsonl`; `dataset_sha256` is the dataset's `rows_sha256`."""

    schema: int
    member: str
    fingerprint: str
    dataset_sha256: str
    samples: int
    shards: int
    rows_sha256: str
    empty_sha256: str | None  # of the empty text; None beside other kinds


class SidecarManifest(NamedTuple):
    header: SidecarHeader
    facts: Facts
    shards: tuple[SidecarShard, ...]


Header = TypeVar("Header", IndexHeader, SidecarHeader)


class SidecarFiles(NamedTuple):
    """The files that follow from the indexes."""

    rows: bytes
    manifest: bytes


def fingerprint(facts: Facts) -> str:
    """The hash of the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def difference(wanted: Facts, found: Facts) -> str:
    """The facts that differ, each with both values."""
    names = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    return "; ".join(f"{name}: {found.get(name)!r:.90} there, {wanted.get(name)!r:.90} here" for name in names)


def write_shard(
    folder: Path, kind: str, source: ManifestShard, facts: Facts, samples: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes the tar that belongs to a shard of the dataset, and then its index."""
    folder.mkdir(exist_ok=True)
    suffix = suffix_of(kind)
    members = ((key, {suffix: tensor_bytes(kind, tensor, f"{key}.{suffix}")}) for key, tensor in samples)
    with new_file(shard_path(folder, source.shard)) as file:
        tar = write_tar(file, members)
        if len(tar.samples) != source.totals.samples:
            raise ShardError(f"{source.shard}: {len(tar.samples)} samples; the dataset has {source.totals.samples}")
        # The index of a tar that is replaced would seem to fit this one.
        index_path(folder, source.shard).unlink(missing_ok=True)
    header = IndexHeader(
        VERSION,
        source.shard,
        suffix,
        fingerprint(facts),
        source.tar_sha256,
        len(tar.samples),
        tar.bytes,
        tar.sha256,
    )
    places = tuple(Place(sample.key, *sample.members[0][1:]) for sample in tar.samples)
    write_file(index_path(folder, source.shard), index_bytes(SidecarIndex(header, facts, places)))


def index_bytes(index: SidecarIndex) -> bytes:
    """The index file of a shard."""
    return seal([asdict(index.header), index.facts, *map(list, index.places)])


def read_index(folder: Path, kind: str, shard: str) -> SidecarIndex:
    """The checked index of a shard."""
    path = index_path(folder, shard)
    header, facts, lines = _read_sealed(path, IndexHeader)
    keys = []
    for at, line in enumerate(lines, 3):
        if not (isinstance(line, list) and [type(item) for item in line] == [str, int, int, int]):
            raise ShardError(f"{path}, line {at} is not [key, offset, size, CRC]; {REMEDY}")
        keys.append(sort_key(line[0]))
    if (header.shard, header.member, header.samples) != (shard, suffix_of(kind), len(lines)):
        raise ShardError(
            f"{path} is the index of {header.shard!r:.40}, {header.member!r:.40}, {header.samples} samples"
        )
    if keys != sorted(set(keys)):
        raise ShardError(f"{path}: its keys do not ascend")
    return SidecarIndex(header, facts, tuple(Place(*line) for line in lines))


def sidecar_files(manifest: Manifest, indexes: Sequence[SidecarIndex], empty_text: bytes | None) -> SidecarFiles:
    """The table and the manifest that belong to the indexes of all shards, in the dataset's order."""
    first = indexes[0]
    for index, source in zip(indexes, manifest.shards, strict=True):
        check_source(index, source)
        if index.facts != first.facts:
            raise ShardError(
                f"{first.header.shard} and {index.header.shard} of {first.header.member} were not made alike: "
                f"{difference(index.facts, first.facts)}; run `fw data encode` with --replace"
            )
    table = np.concatenate([_rows(index, number) for number, index in enumerate(indexes)])
    rows = table.tobytes()
    header = SidecarHeader(
        VERSION,
        first.header.member,
        first.header.fingerprint,
        manifest.header.rows_sha256,
        len(table),
        len(indexes),
        hashlib.sha256(rows).hexdigest(),
        None if empty_text is None else hashlib.sha256(empty_text).hexdigest(),
    )
    headers = [index.header for index in indexes]
    lines = [SidecarShard(h.shard, h.samples, h.source_sha256, h.tar_bytes, h.tar_sha256) for h in headers]
    return SidecarFiles(rows, seal([asdict(header), first.facts, *map(asdict, lines)]))


def check_source(index: SidecarIndex, source: ManifestShard) -> None:
    """Refuses an index that was made for another shard."""
    header = index.header
    wanted = source.shard, source.totals.samples, source.tar_sha256
    if (header.shard, header.samples, header.source_sha256) != wanted:
        raise ShardError(
            f"{header.member} of {header.shard} was made for other samples than the dataset has now; "
            "remove that folder, or run `fw data encode` with --replace"
        )


def finish_sidecar(folder: Path, kind: str, manifest: Manifest, empty_text: bytes | None = None) -> None:
    """Writes what joins the shards, which must all be there; `sidecar.jsonl` comes last."""
    files = sidecar_files(manifest, [read_index(folder, kind, line.shard) for line in manifest.shards], empty_text)
    if empty_text is not None:
        write_file(folder / EMPTY_TEXT, empty_text)
    write_file(folder / ROWS, files.rows)
    write_file(folder / SIDECAR, files.manifest)


def read_manifest(folder: Path, kind: str) -> SidecarManifest:
    """The checked `sidecar.jsonl` of a folder."""
    path = folder / SIDECAR
    header, facts, rest = _read_sealed(path, SidecarHeader)
    lines = tuple(read_record(SidecarShard, line, f"{path}, line {at}") for at, line in enumerate(rest, 3))
    counts = len(lines), sum(line.samples for line in lines)
    if (header.member, header.shards, header.samples) != (suffix_of(kind), *counts):
        raise ShardError(f"{path} does not say what it is: {header.member!r:.40}, {header.shards} shards; {REMEDY}")
    return SidecarManifest(header, facts, lines)


def parse_row(row: np.void, shards: Sequence[str], where: str) -> tuple[str, str, Member]:
    """Key, shard and place of the member, from a checked row of the table; `shards` are all names."""
    if zlib.crc32(row.tobytes()[:_ROW_CRC_AT]) != row["row_crc32"] or row["shard"] >= len(shards):
        raise ShardError(f"{where} is damaged; {REMEDY}")
    place = Member("", int(row["offset"]), int(row["size"]), int(row["crc32"]))
    return row["key"].decode(), shards[int(row["shard"])], place


def _rows(index: SidecarIndex, number: int) -> NDArray[np.void]:
    """The rows of a shard."""
    rows = np.zeros(len(index.places), ROW)
    for row, (key, *place) in zip(rows, index.places, strict=True):
        row["key"], row["shard"] = key.encode(), number
        row["offset"], row["size"], row["crc32"] = place
        row["row_crc32"] = zlib.crc32(row.tobytes()[:_ROW_CRC_AT])
    return rows


def _read_sealed(path: Path, kind: type[Header]) -> tuple[Header, Facts, list[Any]]:
    """Header, facts and further lines of a sealed file whose fingerprint is that of its facts."""
    if not path.is_file():
        raise ShardError(f"{path} is missing; {REMEDY}")
    lines = unseal(path.read_bytes(), str(path), REMEDY)
    first = lines[0] if lines and isinstance(lines[0], dict) else {}
    if first.get("schema") != VERSION:
        raise SchemaError(
            f"{path}: schema {first.get('schema')!r:.40} is unknown to this reader, which knows {VERSION}"
        )
    header = read_record(kind, first, f"{path}, line 1")
    facts = lines[1] if len(lines) > 1 else None
    if not isinstance(facts, dict) or fingerprint(facts) != header.fingerprint:
        raise ShardError(f"{path}, line 2: these facts do not have the fingerprint of line 1; {REMEDY}")
    return header, facts, lines[2:]
