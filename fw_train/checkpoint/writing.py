"""The steps of a save: copy to host memory, a rank's files, everybody's files gathered, the commit.

Each function leaves the folder such that a kill at any point of it loses nothing that was committed.
"""

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fw_train.atomic_files import clear_partial, new_file, sync
from fw_train.checkpoint.fragments import (
    DATA_FORMAT,
    PARTS,
    ChunkHasher,
    Piece,
    RankIndex,
    chunks_digest,
    coverage_problems,
    index_bytes,
    parse_index,
)
from fw_train.checkpoint.layout import (
    MANIFEST,
    REPLACED,
    STAGING,
    TRASH,
    FileRecord,
    Manifest,
    data_name,
    folder_name,
    index_name,
    manifest_bytes,
    weights_name,
)
from fw_train.checkpoint.retention import discard
from fw_train.engine.base import Fragment
from fw_train.weights.files import CheckpointError, listing
from fw_train.weights.safetensors_writing import write_safetensors

log = logging.getLogger(__name__)


class HostCopies:
    """Host memory for what is being written, kept from save to save; pinned where it is copied from a GPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def flat(self, fragments: Sequence[Fragment]) -> Tensor:
        """[3, elements]: masters, first and second moments of all fragments, one after the other."""
        numel = sum(fragment.numel for fragment in fragments)
        on_gpu = any(fragment.master.is_cuda for fragment in fragments)
        copies = self._like("fragments", (len(PARTS), numel), torch.float32, on_gpu)
        offset = 0
        for fragment in fragments:
            for row, part in zip(copies, PARTS, strict=True):
                row[offset : offset + fragment.numel].copy_(getattr(fragment, part).detach(), non_blocking=on_gpu)
            offset += fragment.numel
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU; later changes of the originals do not reach them."""
        copies = {}
        for name, tensor in tensors.items():
            copies[name] = self._like(f"weights {name}", tuple(tensor.shape), tensor.dtype, tensor.is_cuda)
            copies[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _like(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or tuple(kept.shape) != shape or kept.dtype != dtype:
            kept = self._kept[key] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        return kept


def write_rank(staging: Path, rank: int, pieces: tuple[Piece, ...], snapshot: Tensor, rng: dict[str, Any]) -> None:
    """Writes a rank's data and then its index, whose appearance tells rank 0 that the data are on the disk."""
    hasher = ChunkHasher()
    with open(staging / data_name(rank), "xb") as file:

        def write(data: memoryview) -> None:
            file.write(data)
            hasher.update(data)

        write_safetensors(write, dict(zip(PARTS, snapshot, strict=True)), {"format": DATA_FORMAT})
        file.flush()
        os.fsync(file.fileno())
    index = RankIndex(pieces, hasher.digests(), hasher.size, rng)
    # Rank 0 syncs the names of all when it seals the folder, and renames it as soon as it has seen the last index.
    with new_file(staging / index_name(rank), sync_name=False) as index_file:
        index_file.write(index_bytes(index))


def report_failure(staging: Path, rank: int, text: str) -> None:
    """Tells rank 0 that there is nothing to wait for; its data make room first, as the disk may be full."""
    try:
        (staging / data_name(rank)).unlink(missing_ok=True)
        (staging / _failure_name(rank)).write_text(text)
    except FileNotFoundError:
        log.debug("rank %d: rank 0 has given this save up: %s", rank, text)
    except OSError as error:
        log.warning("rank %d could not report that its save failed (%s): %s", rank, text, error)


def await_ranks(staging: Path, ranks: int, deadline_s: float, give_up: threading.Event) -> tuple[FileRecord, ...]:
    """What the manifest says about everybody's files, once all are on the disk; an error where one fails or is late."""
    deadline, pause = time.monotonic() + deadline_s, 0.005
    missing = set(range(ranks))
    records: dict[int, tuple[FileRecord, FileRecord]] = {}
    pieces: list[Piece] = []
    while missing:
        names = set(os.listdir(staging))
        for rank in sorted(missing):
            if _failure_name(rank) in names:
                text = (staging / _failure_name(rank)).read_text(errors="replace")
                raise OSError(f"rank {rank}: {text or 'it could not write, nor say why'}")
            if index_name(rank) in names:
                records[rank], index = _records(staging, rank)
                pieces.extend(index.pieces)
                missing.discard(rank)
        if missing and give_up.wait(pause):
            raise OSError("the run ends")
        if missing and time.monotonic() > deadline:
            raise OSError(f"the ranks {sorted(missing)} have not written within {deadline_s:.0f} s")
        pause = min(0.25, 1.5 * pause)
    problems = coverage_problems(pieces)
    if problems:
        raise CheckpointError(f"the ranks' fragments do not make up the parameters: {listing(problems)}")
    return tuple(record for rank in range(ranks) for record in records[rank])


def seal(staging: Path, manifest: Manifest) -> None:
    """Says what belongs to the checkpoint; after this nothing is written, only renamed."""
    with new_file(staging / MANIFEST) as file:
        file.write(manifest_bytes(manifest))


def commit(staging: Path, folder: Path, manifest: Manifest) -> Path:
    """Gives the sealed files their name.

    An older checkpoint of the same step stays loadable under another name until the new one has its own.
    """
    path = folder / folder_name(manifest.step)
    replaced = folder / f"{REPLACED}{path.name}.{manifest.save_number:x}"
    if path.exists():
        os.rename(path, replaced)
    os.rename(staging, path)
    sync(folder)
    if replaced.exists():
        discard(replaced)
    return path


def give_up(staging: Path) -> None:
    """Removes an unfinished save; renamed first, because other ranks may still be making files in it."""
    try:
        discard(staging)
    except OSError as error:
        log.warning("%s could not be removed (%s); the next save tries again", staging, error)


def clear_leftovers(folder: Path) -> None:
    """Removes what killed saves and removals have left; only for the owner of the run's folder, between saves."""
    clear_partial(folder.parent, weights_name("*"))
    for prefix in (STAGING, TRASH):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    for replaced in folder.glob(f"{REPLACED}*"):
        if (folder / replaced.name.removeprefix(REPLACED).partition(".")[0] / MANIFEST).exists():
            discard(replaced)


def _records(staging: Path, rank: int) -> tuple[tuple[FileRecord, FileRecord], RankIndex]:
    """Name, size and hash of a rank's files, after a look at their sizes."""
    data = (staging / index_name(rank)).read_bytes()
    index = parse_index(data, staging / index_name(rank))
    size = (staging / data_name(rank)).stat().st_size
    if size != index.size:
        raise CheckpointError(f"{staging / data_name(rank)} has {size} bytes, rank {rank} wrote {index.size}")
    return (
        FileRecord(data_name(rank), index.size, chunks_digest(index.chunks)),
        FileRecord(index_name(rank), len(data), hashlib.sha256(data).hexdigest()),
    ), index


def _failure_name(rank: int) -> str:
    return index_name(rank).removesuffix(".json") + ".failed"
