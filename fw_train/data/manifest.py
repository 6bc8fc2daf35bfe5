"""What a packed dataset says about itself: an index beside each shard, and one manifest with a table of all samples.

    shard-000000.index.jsonl  a header, a line for each sample with its members, a line for each rejected clip, a seal
    samples.bin               a fixed-size row for each sample, in the order of the shards
    rejects.jsonl             all rejected clips with their reasons
    manifest.jsonl            a summary, a line for each shard, a seal; written last

The last three follow from the indexes alone, byte for byte. A seal is the SHA-256 of the lines before it; a row of
`samples.bin` has a CRC. A reader of that table reads only the rows it needs, whatever their number.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fw_train.atomic_files import write_file
from fw_train.data.codec_format import PresetName
from fw_train.data.schema import KEY_LENGTH, SUFFIXES, VERSION, Bucket, refuse_url
from fw_train.data.shards import SHARD_NAME, IndexedSample, Member, ShardError, ShardFiles, sort_key
from fw_train.data.strict_json import SchemaError, read_json, read_record
from fw_train.data.table import Table

MANIFEST, ROWS, REJECTS, INDEX_SUFFIX = "manifest.jsonl", "samples.bin", "rejects.jsonl", ".index.jsonl"

_COUNT = (len(SUFFIXES),)
ROW = np.dtype(
    [
        ("key", f"S{KEY_LENGTH}"),
        ("shard", "<u4"),
        ("offset", "<u8", _COUNT),  # members in the order of SUFFIXES
        ("size", "<u4", _COUNT),
        ("crc32", "<u4", _COUNT),
        ("row_crc32", "<u4"),  # of the bytes before it
    ]
)
_ROW_CRC_AT = ROW.itemsize - 4
_SHA256 = re.compile("[0-9a-f]{64}")


class Rejected(NamedTuple):
    """A clip that was left out."""

    id: str
    reason: str


@dataclass(frozen=True)
class Settings:
    """What decides, with the raw folder, every byte of a dataset."""

    preset: PresetName
    frames: int | None
    shard_size: int


@dataclass(frozen=True)
class LabelTotals:
    """Sums over samples, the largest error among them."""

    raw_bytes: int = 0
    encoded_bytes: int = 0
    max_rel_error: float = 0.0
    frames: int = 0
    lossless_frames: int = 0

    def __add__(self, other: "LabelTotals") -> "LabelTotals":
        return LabelTotals(
            self.raw_bytes + other.raw_bytes,
            self.encoded_bytes + other.encoded_bytes,
            max(self.max_rel_error, other.max_rel_error),
            self.frames + other.frames,
            self.lossless_frames + other.lossless_frames,
        )


@dataclass(frozen=True)
class Totals:
    """Sums over samples."""

    samples: int = 0
    video_bytes: int = 0
    captions_missing: int = 0
    depth: LabelTotals = LabelTotals()
    points: LabelTotals = LabelTotals()

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.samples + other.samples,
            self.video_bytes + other.video_bytes,
            self.captions_missing + other.captions_missing,
            self.depth + other.depth,
            self.points + other.points,
        )


@dataclass(frozen=True)
class IndexHeader:
    """The first line of an index; `plan` is a hash of the metadata and settings that the shard was to be made from."""

    schema: int
    shard: str
    bucket: str
    plan: str
    settings: Settings
    tar_bytes: int
    tar_sha256: str
    rejects: int
    totals: Totals


class ShardIndex(NamedTuple):
    header: IndexHeader
    samples: tuple[IndexedSample, ...]
    rejects: tuple[Rejected, ...]


@dataclass(frozen=True)
class ManifestShard:
    """The line of a shard; its samples are rows `first` to `first + totals.samples` of the table."""

    shard: str
    bucket: str
    first: int
    tar_bytes: int
    tar_sha256: str
    rejects: int
    totals: Totals


@dataclass(frozen=True)
class BucketRows:
    """The rows of a bucket, which follow each other."""

    bucket: str
    first: int
    samples: int


@dataclass(frozen=True)
class ManifestHeader:
    """The first line of a manifest."""

    schema: int
    settings: Settings
    members: str  # the suffixes, in the order of a row's offsets
    samples: int
    rejects: int
    shards: int
    rows_sha256: str
    rejects_sha256: str


class Manifest(NamedTuple):
    header: ManifestHeader
    shards: tuple[ManifestShard, ...]

    @property
    def buckets(self) -> tuple[BucketRows, ...]:
        """Row ranges, in the order of the table."""
        ranges = []
        for bucket, group in groupby(self.shards, key=lambda line: line.bucket):
            lines = list(group)
            ranges.append(BucketRows(bucket, lines[0].first, sum(line.totals.samples for line in lines)))
        return tuple(ranges)

    @property
    def totals(self) -> Totals:
        return sum((line.totals for line in self.shards), Totals())


class DatasetFiles(NamedTuple):
    """The files that follow from the indexes."""

    rows: bytes
    rejects: bytes
    manifest: bytes


class Sample(NamedTuple):
    """Where a sample lies."""

    key: str
    shard: str
    members: dict[str, Member]


def seal(lines: Iterable[Any]) -> bytes:
    """JSON lines, and one with the SHA-256 of all before it."""
    body = b"".join(_line(line) for line in lines)
    return body + _line({"sha256": hashlib.sha256(body).hexdigest()})


def unseal(data: bytes, where: str, remedy: str = "pack again, which restores it") -> list[Any]:
    """The lines of a sealed file; one that was cut, changed or joined is refused."""
    start = data.rstrip(b"\n").rfind(b"\n") + 1
    body, last = data[:start], data[start:]
    if last != _line({"sha256": hashlib.sha256(body).hexdigest()}):
        raise ShardError(f"{where} is damaged: its last line is not the SHA-256 of those before it; {remedy}")
    return read_json(b"[" + b",".join(body.splitlines()) + b"]", where)  # one call takes half as long as one a line


def index_path(folder: Path, shard: str) -> Path:
    return folder / f"{shard}{INDEX_SUFFIX}"


def index_bytes(index: ShardIndex) -> bytes:
    """The index file of a shard."""
    samples = [{"key": s.key, "members": {m.suffix: m[1:] for m in s.members}} for s in index.samples]
    return seal([asdict(index.header), *samples, *map(Rejected._asdict, index.rejects)])


def read_index(folder: Path, shard: str) -> ShardIndex:
    """The checked index of a shard."""
    path = index_path(folder, shard)
    if not path.is_file():
        raise ShardError(f"{path} is missing; pack again, which restores it")
    first, *rest = unseal(path.read_bytes(), str(path)) or [None]
    _check_version(first, str(path))
    header = read_record(IndexHeader, first, f"{path}, line 1")
    samples = tuple(_indexed(line, f"{path}, line {at}") for at, line in enumerate(rest, 2) if _has(line, "members"))
    rejects = tuple(_rejected(line, f"{path}, line {at}") for at, line in enumerate(rest, 2) if _has(line, "reason"))
    keys = [sort_key(sample.key) for sample in samples]
    if header.shard != shard or keys != sorted(set(keys)):
        raise ShardError(f"{path} is the index of {header.shard!r:.40}, or its keys do not ascend")
    counts = len(samples), len(rejects), len(samples) + len(rejects)
    if counts != (header.totals.samples, header.rejects, len(rest)):
        raise ShardError(f"{path}: {counts[0]} samples and {counts[1]} rejects are not what its first line says")
    Bucket.parse(header.bucket)
    return ShardIndex(header, samples, rejects)


def dataset_files(indexes: Sequence[ShardIndex]) -> DatasetFiles:
    """The table, the rejects and the manifest that belong to the indexes of all shards, in order."""
    tables, rejects, lines, first = [], [], [], 0
    for number, index in enumerate(indexes):
        header = index.header
        tables.append(_rows(index, number))
        rejects += [_line(reject._asdict()) for reject in index.rejects]
        facts = header.shard, header.bucket, first, header.tar_bytes, header.tar_sha256, header.rejects, header.totals
        lines.append(ManifestShard(*facts))
        first += len(index.samples)
    table = np.concatenate(tables) if tables else np.empty(0, ROW)
    keys, counts = np.unique(table["key"], return_counts=True)
    if (counts > 1).any():
        raise ShardError(f"key {keys[counts > 1][0].decode()} is in two shards")
    rows_data, rejects_data = table.tobytes(), b"".join(rejects)
    summary = ManifestHeader(
        VERSION,
        indexes[0].header.settings,
        " ".join(SUFFIXES),
        first,
        len(rejects),
        len(lines),
        hashlib.sha256(rows_data).hexdigest(),
        hashlib.sha256(rejects_data).hexdigest(),
    )
    return DatasetFiles(rows_data, rejects_data, seal([asdict(summary), *map(asdict, lines)]))


def write_dataset_files(folder: Path, files: DatasetFiles) -> None:
    """Writes them, the manifest last."""
    write_file(folder / ROWS, files.rows)
    write_file(folder / REJECTS, files.rejects)
    write_file(folder / MANIFEST, files.manifest)


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a dataset."""
    refuse_url(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ShardError(f"{path} is missing; `fw data pack` writes it when all shards are there")
    first, *rest = unseal(path.read_bytes(), str(path)) or [None]
    _check_version(first, str(path))
    header = read_record(ManifestHeader, first, f"{path}, line 1")
    lines = tuple(read_record(ManifestShard, line, f"{path}, line {at}") for at, line in enumerate(rest, 2))
    at = 0
    for line in lines:
        if not (SHARD_NAME.fullmatch(line.shard) and line.first == at and _SHA256.fullmatch(line.tar_sha256)):
            raise ShardError(f"{path}: the line of shard {line.shard!r:.40} is impossible")
        Bucket.parse(line.bucket)
        at += line.totals.samples
    if (header.samples, header.shards, header.members) != (at, len(lines), " ".join(SUFFIXES)):
        raise ShardError(f"{path}: the first line does not fit the {len(lines)} shards with {at} samples that follow")
    if len({line.shard for line in lines}) != len(lines):
        raise ShardError(f"{path}: a shard is listed twice")
    return Manifest(header, lines)


class Places(NamedTuple):
    """What finding samples takes of a manifest."""

    samples: int
    shards: tuple[str, ...]
    buckets: tuple[BucketRows, ...]


class Dataset:
    """Random access to a packed dataset by row; may be used from several processes and pickled."""

    def __init__(self, folder: str | Path, places: Places | None = None) -> None:
        """`places` is what copies in other processes have: a manifest of a million samples takes half a second to check."""
        self.folder = Path(folder)
        self._places = places or self._checked_places()
        self._rows = Table(self.folder / ROWS, ROW, self._places.samples, "`fw data pack --manifest-only` restores it")
        self._files = ShardFiles(self.folder)

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shards(self) -> tuple[str, ...]:
        """Names, in the order of the table."""
        return self._places.shards

    @property
    def buckets(self) -> tuple[BucketRows, ...]:
        return self._places.buckets

    def sample(self, row: int) -> Sample:
        """Where the sample of a row lies."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} is not in {self.folder}, which has rows 0 to {len(self) - 1}")
        return parse_row(self._rows[row], self.shards, f"{self.folder / ROWS}, row {row}")

    def read(self, row: int, suffixes: Sequence[str] = SUFFIXES) -> dict[str, bytes]:
        """The checked bytes of some members of a sample."""
        sample = self.sample(row)
        return {suffix: self._files.read(sample.shard, sample.key, sample.members[suffix]) for suffix in suffixes}

    def find(self, key: str) -> int:
        """The row of a key; looks through all rows."""
        rows = self.find_all([key])
        if not len(rows):
            raise ShardError(f"{self.folder} has no sample {key!r:.100}")
        return int(rows[0])

    def find_all(self, keys: Iterable[str]) -> NDArray[np.int64]:
        """The rows, ascending, of those keys that are there; looks through all rows, unless there are no keys."""
        wanted = {key.encode() for key in keys}
        blocks = self._rows.blocks() if wanted else ()
        found = [first + at for first, rows in blocks for at, key in enumerate(rows["key"].tolist()) if key in wanted]
        return np.array(found, np.int64)

    def keys(self) -> NDArray[np.bytes_]:
        """The keys of all rows."""
        return self._rows.column("key")

    def close(self) -> None:
        self._files.close()

    def _checked_places(self) -> Places:
        header, shards = self.manifest
        if not header.samples:
            raise ShardError(
                f"{self.folder} holds no samples: all {header.rejects} clips are in {self.folder / REJECTS}"
            )
        return Places(header.samples, tuple(line.shard for line in shards), self.manifest.buckets)

    def __reduce__(self) -> tuple[Any, ...]:  # open files stay where they are
        return Dataset, (self.folder, self._places)


def parse_row(row: np.void, shards: Sequence[str], where: str) -> Sample:
    """A row of the table, checked; `shards` are all names."""
    if zlib.crc32(row.tobytes()[:_ROW_CRC_AT]) != row["row_crc32"] or row["shard"] >= len(shards):
        raise ShardError(f"{where} is damaged; `fw data pack --manifest-only` writes the table again")
    places = zip(SUFFIXES, row["offset"].tolist(), row["size"].tolist(), row["crc32"].tolist(), strict=True)
    members = {place[0]: Member(*place) for place in places}
    return Sample(row["key"].decode(), shards[int(row["shard"])], members)


def _rows(index: ShardIndex, number: int) -> NDArray[np.void]:
    """The rows of a shard."""
    rows = np.zeros(len(index.samples), ROW)
    for row, (key, members) in zip(rows, index.samples, strict=True):
        row["key"], row["shard"] = key.encode(), number
        _, row["offset"], row["size"], row["crc32"] = zip(*members, strict=True)
        row["row_crc32"] = zlib.crc32(row.tobytes()[:_ROW_CRC_AT])
    return rows


def _line(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _has(line: Any, name: str) -> bool:
    return isinstance(line, dict) and name in line


def _check_version(document: Any, where: str) -> None:
    found = document.get("schema") if isinstance(document, dict) else None
    if found != VERSION:
        raise SchemaError(f"{where}: schema {found!r:.40} is unknown to this reader, which knows {VERSION}")


def _indexed(line: dict[str, Any], where: str) -> IndexedSample:
    members = line["members"]
    whole = isinstance(line.get("key"), str) and isinstance(members, dict) and tuple(members) == SUFFIXES
    if not whole or not all(_is_place(place) for place in members.values()):
        raise ShardError(f"{where} is not a key with the members {', '.join(SUFFIXES)}, each [offset, size, CRC]")
    return IndexedSample(line["key"], tuple(Member(suffix, *place) for suffix, place in members.items()))


def _is_place(place: Any) -> bool:
    return isinstance(place, list) and len(place) == 3 and all(type(n) is int and n >= 0 for n in place)


def _rejected(line: dict[str, Any], where: str) -> Rejected:
    if not all(isinstance(line.get(name), str) for name in Rejected._fields):
        raise ShardError(f"{where} is not a rejected clip with id and reason")
    return Rejected(line["id"], line["reason"])


def iter_shards(folder: Path) -> Iterator[str]:
    """Names of the shards of which a tar or an index is there, in order."""
    names = {path.name.removesuffix(INDEX_SUFFIX).removesuffix(".tar") for path in folder.glob("shard-*")}
    yield from sorted(name for name in names if SHARD_NAME.fullmatch(name))
