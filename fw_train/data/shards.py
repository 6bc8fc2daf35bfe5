"""Shards: plain tars that are read by position and never extracted.

A tar holds regular files alone, `<key>.<suffix>` in ascending order, in USTAR headers that follow from name and size; so
the same samples give the same bytes, and `webdataset` reads them. Anything else in a tar is refused with its name.
"""

import hashlib
import os
import re
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from fw_train.data.schema import KEY, SIDECAR_SUFFIXES, SUFFIXES

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_MEMBER = (1 << 32) - 1  # bytes
SHARD_NAME = re.compile(r"shard-\d{6}")
MAX_OPEN = 64  # shards that a reader keeps open

_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
}


class ShardError(ValueError):
    """A shard that cannot be trusted; the message names file, key and member."""


class Member(NamedTuple):
    """Where the bytes of a file lie in a tar; `crc32` is of these bytes."""

    suffix: str
    offset: int
    size: int
    crc32: int


class Entry(NamedTuple):
    """A file of a tar, as its header tells."""

    key: str
    suffix: str
    offset: int
    size: int


class IndexedSample(NamedTuple):
    """The members of a sample, sorted by suffix."""

    key: str
    members: tuple[Member, ...]


class TarFacts(NamedTuple):
    """A tar just written."""

    bytes: int
    sha256: str
    samples: tuple[IndexedSample, ...]


def write_tar(file: IO[bytes], samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> TarFacts:
    """Writes samples (key, suffix -> bytes), whose keys must ascend as `sort_key` orders them."""
    digest, position = hashlib.sha256(), 0
    indexed: list[IndexedSample] = []

    def put(data: bytes) -> None:
        nonlocal position
        file.write(data)
        digest.update(data)
        position += len(data)

    for key, contents in samples:
        if indexed and sort_key(indexed[-1].key) >= sort_key(key):
            raise ShardError(f"sample {key} comes after {indexed[-1].key}; keys ascend in a shard")
        members = []
        for suffix in sorted(contents):
            data = contents[suffix]
            if len(data) > MAX_MEMBER:
                raise ShardError(f"{key}.{suffix} has {len(data)} bytes, more than {MAX_MEMBER}")
            put(header_block(f"{key}.{suffix}", len(data)))
            members.append(Member(suffix, position, len(data), zlib.crc32(data)))
            put(data)
            put(bytes(-len(data) % BLOCK))
        indexed.append(IndexedSample(key, tuple(members)))
    put(END)
    return TarFacts(position, digest.hexdigest(), tuple(indexed))


def sort_key(key: str) -> str:
    """Sorts keys as the names of their members sort."""
    return key + "."


def header_block(name: str, size: int) -> bytes:
    """The only header that a member of this name and size has here."""
    facts = tarfile.TarInfo(name)
    facts.size, facts.mode, facts.mtime = size, 0o644, 0
    facts.uid = facts.gid = 0
    return facts.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def scan_tar(path: Path, suffixes: Collection[str] = (*SUFFIXES, *SIDECAR_SUFFIXES)) -> list[Entry]:
    """The files of a tar from its headers alone; raises ShardError at the first thing that has no place in a shard."""
    entries: list[Entry] = []
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        position = 0
        before = ""
        while (block := os.pread(file.fileno(), BLOCK, position)) != bytes(BLOCK):
            if len(block) < BLOCK:
                raise ShardError(f"{path} is truncated: it ends at byte {total} without the end mark of a tar")
            name, size = _read_header(path, block, position)
            key, suffix = _split(path, name, suffixes)
            if name == before:
                raise ShardError(f"{path}: {name} is there twice")
            if name < before:
                raise ShardError(f"{path}: {name} comes after {before}; members ascend by name, each is there once")
            end = position + BLOCK + size
            padded = end + -size % BLOCK
            if padded > total:
                raise ShardError(f"{path} is truncated: {name} ends at byte {padded} of {total}")
            if any(os.pread(file.fileno(), padded - end, end)):
                raise ShardError(f"{path}: the padding behind {name} is not zero")
            entries.append(Entry(key, suffix, position + BLOCK, size))
            before, position = name, padded
        if os.pread(file.fileno(), 2 * len(END), position) != END:
            raise ShardError(f"{path}: {total - position} bytes behind the last member instead of {len(END)} zeros")
    return entries


def shard_path(folder: Path, name: str) -> Path:
    """The tar of a shard; a name that is more than a name is refused."""
    if not SHARD_NAME.fullmatch(name):
        raise ShardError(f"{name!r:.100} is no shard name; shards are called shard-000000, shard-000001, ...")
    return folder / f"{name}.tar"


class ShardFiles:
    """Reads members by position from the tars of one folder; may be used from several processes and pickled."""

    def __init__(self, folder: Path, remedy: str = "pack again, which writes missing shards alone") -> None:
        self.folder = folder
        self.remedy = remedy  # for a tar that is gone
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: str, key: str, member: Member) -> bytes:
        """The bytes of a member, checked."""
        path = shard_path(self.folder, shard)
        where = f"{path}: {key}.{member.suffix}"
        descriptor = self._descriptor(shard, path)
        parts, position, end = [], member.offset, member.offset + member.size
        while position < end:  # one call gives at most 2 GiB
            part = os.pread(descriptor, end - position, position)
            if not part:
                raise ShardError(f"{where} ends at byte {position} instead of {end}: the shard is truncated")
            parts.append(part)
            position += len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        found = zlib.crc32(data)
        if found != member.crc32:
            raise ShardError(
                f"{where} is damaged: CRC {found:08x} instead of {member.crc32:08x}; `fw data verify` names all such members"
            )
        return data

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, shard: str, path: Path) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        try:
            self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ShardError(f"{path} is missing; restore it, or {self.remedy}") from None
        return self._open[shard]

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> tuple[Path, str]:
        return self.folder, self.remedy

    def __setstate__(self, state: tuple[Path, str]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def _read_header(path: Path, block: bytes, position: int) -> tuple[str, int]:
    """Name and size from a header block, which must be the one that `header_block` writes."""
    try:
        facts = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"{path}: the tar header at byte {position} is damaged ({error})") from None
    name = facts.name
    if name.startswith("/"):
        raise ShardError(f"{path}: {name!r:.120} is an absolute name")
    if ".." in name.split("/"):
        raise ShardError(f"{path}: {name!r:.120} points out of the folder")
    if facts.type in _KINDS:
        raise ShardError(f"{path}: {name!r:.120} is {_KINDS[facts.type]}; shards hold regular files alone")
    canonical = name.isascii() and len(name) <= tarfile.LENGTH_NAME and 0 <= facts.size <= MAX_MEMBER
    if not canonical or block != header_block(name, facts.size):
        raise ShardError(
            f"{path}: the header of {name!r:.120} at byte {position} is not one of this format (mode 644, times and owners 0, "
            "no extensions); pack the shard with `fw data pack`"
        )
    return name, facts.size


def _split(path: Path, name: str, suffixes: Collection[str]) -> tuple[str, str]:
    key, _, suffix = name.partition(".")
    if not KEY.fullmatch(key) or suffix not in suffixes:
        raise ShardError(
            f"{path}: {name!r:.120} is no member; names are a key of letters, digits, - and _ (no dots), a dot, and one of "
            f"{', '.join(suffixes)}"
        )
    return key, suffix
