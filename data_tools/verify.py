"""Check a packed dataset and what `fw data encode` wrote beside it: that every file is there, unchanged, and decodes.

    fw data verify packed/
    fw data verify packed/ --fast      # headers, indexes and small members alone: finds what is missing, cut or mixed up

Each problem is a line with file, key and member; the exit code is 1 if there is any. A flipped bit in video or label data is
found by the full check alone. `fw data pack` with the same arguments writes damaged indexes and missing shards again; a shard
that is damaged inside is to be deleted first. `fw data encode` does the same for its folders. The list of samples that are not
trained on must be readable, name samples of the dataset, and have lost no line since an audit wrote it.
"""

import argparse
import hashlib
import logging
import mmap
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.pack_sample import sample_totals
from data_tools.problems import Problem, problems_of
from data_tools.verify_quarantine import verify_quarantine
from data_tools.verify_sidecar import verify_sidecars
from data_tools.work import Progress, add_workers, run_parallel
from fw_train.data import schema
from fw_train.data.codec import decode_codes, read_header
from fw_train.data.codec_format import KINDS, Buffer
from fw_train.data.manifest import (
    MANIFEST,
    REJECTS,
    ROW,
    ROWS,
    Manifest,
    ManifestShard,
    ShardIndex,
    Totals,
    dataset_files,
    index_path,
    iter_shards,
    read_index,
    read_manifest,
)
from fw_train.data.schema import CAMERA, INFO, VIDEO, Bucket, SampleInfo
from fw_train.data.shards import Entry, IndexedSample, Member, ShardError, scan_tar, shard_path
from fw_train.data.strict_json import SchemaError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardResult:
    shard: str
    index: ShardIndex | None  # None: unreadable
    problems: list[Problem]


class Job(NamedTuple):
    folder: str
    shard: str
    listed: ManifestShard | None  # the manifest's line
    fast: bool


class Found(NamedTuple):
    samples: int
    shards: int
    sidecars: int
    quarantined: int
    problems: list[Problem]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that `fw data pack` wrote")
    parser.add_argument("--fast", action="store_true", help="headers, indexes and small members alone")
    add_workers(parser, "one shard each")


def run(args: argparse.Namespace) -> int:
    found = verify(args.out, args.fast, args.workers)
    for problem in found.problems:
        print(problem)
    if found.problems:
        damaged = {problem.file for problem in found.problems}
        print(f"{args.out}: {len(found.problems)} problems in {len(damaged)} files")
        return 1
    how = "headers and indexes are" if args.fast else "everything is"
    sidecars = f", encoded in {found.sidecars} folders beside them" if found.sidecars else ""
    quarantined = f", {found.quarantined} of them in quarantine" if found.quarantined else ""
    print(f"{args.out}: {found.samples} samples in {found.shards} shards{sidecars}{quarantined}; {how} in order")
    return 0


def verify(folder: Path, fast: bool = False, workers: int = 1) -> Found:
    """All problems of a dataset, sorted by file."""
    schema.refuse_url(folder)
    if not folder.is_dir():
        raise ShardError(f"no folder {folder}")
    problems: list[Problem] = []
    manifest: Manifest | None = None
    with problems_of(MANIFEST, problems):
        manifest = read_manifest(folder)
    listed = {line.shard: line for line in manifest.shards} if manifest else {}
    shards = sorted({*listed, *iter_shards(folder)})
    if not shards:
        raise ShardError(f"{folder} holds no shards; `fw data pack RAW {folder}` writes them")
    jobs = [Job(str(folder), shard, listed.get(shard), fast) for shard in shards]
    with Progress(len(jobs), "shards") as progress:
        results = list(run_parallel(check_shard, jobs, workers, progress))
    for result in results:
        problems += result.problems
        if manifest and result.shard not in listed:
            problems.append(Problem(f"{result.shard}.tar", "", "", f"is not in {MANIFEST}"))
    indexes = [result.index for result in results if result.index is not None]
    if len(indexes) == len(results):
        problems += _check_joint_files(folder, indexes, manifest)
    elif manifest:
        problems += _check_hashes(folder, manifest)
    samples = sum(len(index.samples) for index in indexes)
    if not samples and not problems:
        problems.append(Problem(MANIFEST, "", "", f"the dataset holds no samples; {REJECTS} says why"))
    sidecars = 0
    if manifest:
        sidecars, more = verify_sidecars(folder, manifest, indexes, fast, workers)
        problems += more
    keys = {sample.key for index in indexes for sample in index.samples} if len(indexes) == len(results) else None
    quarantined, more = verify_quarantine(folder, keys)
    problems += more
    return Found(samples, len(shards), sidecars, quarantined, sorted(set(problems)))


def check_shard(job: Job, advance: Callable[[int], None]) -> ShardResult:
    """Checks a shard and its index."""
    folder, problems = Path(job.folder), list[Problem]()
    tar, index_file = shard_path(folder, job.shard), index_path(folder, job.shard)
    index: ShardIndex | None = None
    with problems_of(index_file.name, problems):
        index = read_index(folder, job.shard)
    if not tar.is_file():
        problems.append(Problem(tar.name, "", "", "is missing"))
    else:
        _check_tar(tar, index, job, problems)
    advance(1)
    return ShardResult(job.shard, index, problems)


def _check_tar(tar: Path, index: ShardIndex | None, job: Job, problems: list[Problem]) -> None:
    source = index.header if index else job.listed
    size = tar.stat().st_size
    if source and size != source.tar_bytes:
        what = f"{'is truncated: ' if size < source.tar_bytes else ''}{size} bytes instead of {source.tar_bytes}"
        problems.append(Problem(tar.name, "", "", what))
    entries: list[Entry] | None = None
    with problems_of(tar.name, problems):
        entries = scan_tar(tar, schema.SUFFIXES)
    samples = index.samples if index else _from_entries(entries or [])
    if index and entries is not None:
        indexed = [Entry(s.key, m.suffix, m.offset, m.size) for s in samples for m in s.members]
        if entries != indexed:
            differing = sorted(set(entries) ^ set(indexed))[0]
            what = "the tar and its index disagree about it"
            problems.append(Problem(tar.name, differing.key, differing.suffix, what))
    totals = Totals()
    if size:
        with (
            open(tar, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            for sample in samples:
                info = _check_sample(tar.name, sample, view, index, job.fast, problems)
                if info:
                    video_bytes = next(m.size for m in sample.members if m.suffix == VIDEO)
                    totals += sample_totals(info, video_bytes)
    if any(problem.file == tar.name for problem in problems):
        return
    if index and totals != index.header.totals:
        problems.append(Problem(f"{job.shard}.index.jsonl", "", "", "its sums are not those of the samples"))
    if not job.fast and source:
        with open(tar, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != source.tar_sha256:
            problems.append(Problem(tar.name, "", "", f"its SHA-256 is {found} instead of {source.tar_sha256}"))


def _from_entries(entries: list[Entry]) -> tuple[IndexedSample, ...]:
    """What an index would say, but for the CRCs."""
    samples: dict[str, list[Member]] = {}
    for key, suffix, offset, size in entries:
        samples.setdefault(key, []).append(Member(suffix, offset, size, -1))
    return tuple(IndexedSample(key, tuple(members)) for key, members in samples.items())


def _check_sample(
    tar: str, sample: IndexedSample, view: memoryview, index: ShardIndex | None, fast: bool, problems: list[Problem]
) -> SampleInfo | None:
    """Checks the members of a sample; the facts of its `json` where that can be read."""
    key = sample.key
    places = {member.suffix: member for member in sample.members}
    for suffix in schema.SUFFIXES:
        if suffix not in places:
            problems.append(Problem(tar, key, suffix, "is missing"))
            return None
    contents = {suffix: view[place.offset : place.offset + place.size] for suffix, place in places.items()}
    whole = set()
    for suffix, place in places.items():
        if len(contents[suffix]) != place.size:
            what = f"is truncated: {len(contents[suffix])} bytes instead of {place.size}"
            problems.append(Problem(tar, key, suffix, what))
        elif place.crc32 >= 0 and (not fast or suffix in (INFO, CAMERA)):
            crc32 = zlib.crc32(contents[suffix])
            if crc32 != place.crc32:
                problems.append(Problem(tar, key, suffix, f"is damaged: CRC {crc32:08x} instead of {place.crc32:08x}"))
            else:
                whole.add(suffix)
        else:
            whole.add(suffix)
    info: SampleInfo | None = None
    if INFO in whole:
        with problems_of(tar, problems, key, INFO):
            facts = schema.parse_info(bytes(contents[INFO]), "it")
            bucket = Bucket.parse(index.header.bucket) if index else facts.bucket
            if facts.key != key or facts.bucket != bucket:
                raise SchemaError(f"it belongs to {facts.key}, {facts.bucket}; here is {key}, {bucket}")
            info = facts
    if info is None:
        return None
    for suffix in sorted(whole - {INFO}):
        with problems_of(tar, problems, key, suffix):
            check_member(suffix, contents[suffix], info, fast)
    for part in contents.values():
        part.release()
    return info


def check_member(suffix: str, data: Buffer, info: SampleInfo, fast: bool) -> None:
    """Raises ValueError where a member cannot be read or is not what the sample's `json` says."""
    if suffix == CAMERA:
        schema.parse_cameras(bytes(data), info.frames, "it")
    elif suffix == VIDEO:
        if fast:
            return
        facts = schema.video_facts(bytes(data), "it", info.video_frames)
        if facts != (info.video_frames, info.height, info.width):
            raise SchemaError(f"it is {facts}; the sample has {info.video_frames} frames of {info.height}x{info.width}")
    else:
        header = read_header(data)
        kind = KINDS[0] if suffix == schema.DEPTH else KINDS[1]
        label = info.depth if kind == "depth" else info.points
        wanted = kind, label.preset, info.frames, info.height, info.width
        if header[:5] != wanted:
            raise SchemaError(f"it holds {header[:5]}, the sample has {wanted}")
        for t in range(0 if fast else info.frames):
            decode_codes(data, [t])


def _check_joint_files(folder: Path, indexes: list[ShardIndex], manifest: Manifest | None) -> list[Problem]:
    """Compares what follows from the indexes with what is there."""
    problems: list[Problem] = []
    with problems_of(MANIFEST, problems):
        files = dataset_files(indexes)
        for name, wanted in ((ROWS, files.rows), (REJECTS, files.rejects), (MANIFEST, files.manifest)):
            path = folder / name
            if not path.is_file():
                problems.append(Problem(name, "", "", "is missing"))
            elif (found := path.read_bytes()) != wanted and not (name == MANIFEST and manifest is None):
                problems.append(_difference(name, found, wanted))
    return problems


def _difference(name: str, found: bytes, wanted: bytes) -> Problem:
    """Where a file begins to differ from what the indexes give."""
    if len(found) != len(wanted):
        return Problem(name, "", "", f"has {len(found)} bytes; the indexes give {len(wanted)}")
    at = int(np.argmax(np.frombuffer(found, np.uint8) != np.frombuffer(wanted, np.uint8)))
    if name == ROWS:
        row = at // ROW.itemsize
        key = np.frombuffer(wanted, ROW)[row]["key"].decode()
        return Problem(name, key, "", f"row {row} differs from the index of its shard at byte {at}")
    line = wanted[:at].count(b"\n") + 1
    return Problem(name, "", "", f"line {line} differs from what the indexes give")


def _check_hashes(folder: Path, manifest: Manifest) -> list[Problem]:
    """Checks the joint files by the manifest, where an index is missing."""
    problems = []
    for name, wanted in ((ROWS, manifest.header.rows_sha256), (REJECTS, manifest.header.rejects_sha256)):
        path = folder / name
        if not path.is_file():
            problems.append(Problem(name, "", "", "is missing"))
        elif hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            problems.append(Problem(name, "", "", f"its SHA-256 is not the one in {MANIFEST}"))
    return problems
