"""The part of `fw data verify` that checks what encoders wrote beside a dataset."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_tools.problems import Problem, problems_of
from data_tools.work import Progress, run_parallel
from fw_train.data.manifest import ROWS, Manifest, ShardIndex, index_path, iter_shards
from fw_train.data.schema import Bucket
from fw_train.data.shards import Entry, Member, ShardError, ShardFiles, scan_tar, shard_path
from fw_train.data.sidecar_files import (
    EMPTY_TEXT,
    SIDECAR,
    SidecarIndex,
    check_source,
    read_index,
    read_manifest,
    sidecar_files,
)
from fw_train.data.sidecar_tensor import KINDS, LATENT_KINDS, latent_shape, parse_tensor, suffix_of


class SidecarJob(NamedTuple):
    folder: str
    kind: str
    shard: str
    bucket: str
    fast: bool


@dataclass(frozen=True)
class SidecarResult:
    index: SidecarIndex | None  # None: unreadable
    problems: list[Problem]


def verify_sidecars(
    folder: Path, manifest: Manifest, indexes: Sequence[ShardIndex], fast: bool, workers: int
) -> tuple[int, list[Problem]]:
    """The number of sidecar folders beside a dataset, and their problems; `indexes` are those of the dataset that can be read."""
    problems: list[Problem] = []
    kinds = [kind for kind in KINDS if (folder / kind).is_dir()]
    keys = {index.header.shard: [sample.key for sample in index.samples] for index in indexes}
    jobs = [SidecarJob(str(folder), kind, s.shard, s.bucket, fast) for kind in kinds for s in manifest.shards]
    with Progress(len(jobs), "sidecar shards") as progress:
        results = list(run_parallel(check_sidecar_shard, jobs, workers, progress))
    for number, kind in enumerate(kinds):
        own = results[number * len(manifest.shards) : (number + 1) * len(manifest.shards)]
        for source, result in zip(manifest.shards, own, strict=True):
            problems += result.problems
            if result.index:
                with problems_of(f"{kind}/{index_path(Path(), source.shard).name}", problems):
                    check_source(result.index, source)
                    own_keys = [place.key for place in result.index.places]
                    if keys.get(source.shard, own_keys) != own_keys:
                        raise ShardError("its keys are not those of the dataset's shard")
        for stranger in sorted(set(iter_shards(folder / kind)) - {line.shard for line in manifest.shards}):
            problems.append(Problem(f"{kind}/{stranger}.tar", "", "", "belongs to no shard of the dataset"))
        found = [result.index for result in own if result.index]
        problems += _check_joint(folder / kind, kind, manifest, found if len(found) == len(own) else None)
    return len(kinds), problems


def check_sidecar_shard(job: SidecarJob, advance: Callable[[int], None]) -> SidecarResult:
    """Checks a shard of a sidecar and its index."""
    folder, problems = Path(job.folder) / job.kind, list[Problem]()
    index: SidecarIndex | None = None
    tar, index_file = shard_path(folder, job.shard), index_path(folder, job.shard)
    with problems_of(f"{job.kind}/{index_file.name}", problems):
        index = read_index(folder, job.kind, job.shard)
    name = f"{job.kind}/{tar.name}"
    with problems_of(name, problems):
        _check_tar(tar, name, index, job, problems)
    advance(1)
    return SidecarResult(index, problems)


def _check_tar(tar: Path, name: str, index: SidecarIndex | None, job: SidecarJob, problems: list[Problem]) -> None:
    if not tar.is_file():
        raise ShardError("is missing")
    suffix = suffix_of(job.kind)
    if index and tar.stat().st_size != index.header.tar_bytes:
        raise ShardError(f"{tar.stat().st_size} bytes instead of {index.header.tar_bytes}")
    entries = scan_tar(tar, [suffix])
    if index is None:
        return
    indexed = [Entry(place.key, suffix, place.offset, place.size) for place in index.places]
    if entries != indexed:
        raise ShardError(f"the tar and its index disagree about {min(set(entries) ^ set(indexed)).key}")
    if job.fast:
        return
    files = ShardFiles(tar.parent)
    for place in index.places:
        with problems_of(name, problems, place.key, suffix):
            data = files.read(job.shard, place.key, Member(suffix, *place[1:]))
            tensor = parse_tensor(job.kind, data, "it")
            if job.kind in LATENT_KINDS:
                wanted = latent_shape(index.facts, Bucket.parse(job.bucket))
                if tensor.shape != wanted:
                    raise ShardError(f"it is {list(tensor.shape)}, its bucket needs {list(wanted)}")
    if any(problem.file == name for problem in problems):
        return
    with open(tar, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != index.header.tar_sha256:
        raise ShardError(f"its SHA-256 is {found} instead of {index.header.tar_sha256}")


def _check_joint(folder: Path, kind: str, manifest: Manifest, indexes: Sequence[SidecarIndex] | None) -> list[Problem]:
    """Compares what joins the shards with the indexes, or, where one cannot be read, by its own hashes."""
    problems: list[Problem] = []
    empty = folder / EMPTY_TEXT if kind == "text" else None
    with problems_of(f"{kind}/{SIDECAR}", problems):
        header = read_manifest(folder, kind).header
        if header.dataset_sha256 != manifest.header.rows_sha256:
            raise ShardError(
                "it was made for other samples than the dataset has now; run `fw data encode` with --replace"
            )
        with problems_of(f"{kind}/{ROWS}", problems):
            if not (folder / ROWS).is_file():
                raise ShardError("is missing")
            if hashlib.sha256((folder / ROWS).read_bytes()).hexdigest() != header.rows_sha256:
                raise ShardError(f"its SHA-256 is not the one in {SIDECAR}")
        if empty:
            with problems_of(f"{kind}/{EMPTY_TEXT}", problems):
                if not empty.is_file():
                    raise ShardError("is missing")
                if hashlib.sha256(empty.read_bytes()).hexdigest() != header.empty_sha256:
                    raise ShardError(f"its SHA-256 is not the one in {SIDECAR}")
                parse_tensor("text", empty.read_bytes(), "it")
        if indexes is not None and not problems:
            files = sidecar_files(manifest, indexes, empty.read_bytes() if empty else None)
            for name, wanted in ((ROWS, files.rows), (SIDECAR, files.manifest)):
                if (folder / name).read_bytes() != wanted:
                    problems.append(Problem(f"{kind}/{name}", "", "", "is not what the indexes of the shards give"))
    return problems
