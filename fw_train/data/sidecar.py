"""Reading what encoders made of a packed dataset: row r of a sidecar belongs to row r of the dataset."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fw_train.data.manifest import ROWS, Dataset
from fw_train.data.schema import Bucket
from fw_train.data.shards import ShardError, ShardFiles
from fw_train.data.sidecar_files import (
    EMPTY_TEXT,
    REMEDY,
    ROW,
    SIDECAR,
    Facts,
    SidecarManifest,
    difference,
    fingerprint,
    parse_row,
    read_manifest,
)
from fw_train.data.sidecar_tensor import KINDS, LATENT_KINDS, latent_shape, parse_tensor, suffix_of
from fw_train.data.table import Table

__all__ = ["KINDS", "Sidecar", "fingerprint", "read_empty_text"]


class Sidecar:
    """Random access by row to one kind of encoded members; may be used from several processes and pickled."""

    def __init__(self, dataset: Dataset, kind: str, facts: Facts | None = None) -> None:
        """`facts` are what copies in other processes have, for which all was checked before."""
        self.dataset, self.kind = dataset, kind
        self.folder = dataset.folder / kind
        self.facts = _matching_manifest(dataset, kind).facts if facts is None else facts
        self.fingerprint = fingerprint(self.facts)
        self._rows = Table(self.folder / ROWS, ROW, len(dataset), REMEDY)
        self._files = ShardFiles(self.folder, REMEDY)

    def __len__(self) -> int:
        return len(self._rows)

    def require(self, facts: Facts) -> None:
        """Refuses numbers that were not made with these facts."""
        if fingerprint(facts) != self.fingerprint:
            raise ShardError(
                f"{self.folder} has the fingerprint {self.fingerprint[:16]}, this run needs {fingerprint(facts)[:16]} "
                f"({difference(facts, self.facts)}); train with what it was made with, or run `fw data encode` with --replace"
            )

    def read(self, row: int) -> dict[str, Tensor]:
        """The checked tensor of a sample, under the name of the kind."""
        sample = self.dataset.sample(row)
        key, shard, place = parse_row(self._rows[row], self.dataset.shards, f"{self.folder / ROWS}, row {row}")
        where = f"{self.folder / shard}.tar: {key}.{suffix_of(self.kind)}"
        if (key, shard) != (sample.key, sample.shard):
            raise ShardError(
                f"{self.folder / ROWS}, row {row} belongs to {key}, the dataset's to {sample.key}; {REMEDY}"
            )
        data = self._files.read(shard, key, place._replace(suffix=suffix_of(self.kind)))
        tensor = parse_tensor(self.kind, data, where)
        if self.kind in LATENT_KINDS:
            wanted = latent_shape(self.facts, self._bucket(row))
            if tensor.shape != wanted:
                raise ShardError(f"{where} is {list(tensor.shape)}, its bucket needs {list(wanted)}; {REMEDY}")
        return {self.kind: tensor}

    def largest(self, without: NDArray[np.int64]) -> int:
        """The row with the most bytes, some rows left out; looks through all rows."""
        sizes = self._rows.column("size")
        sizes[without] = 0
        return int(sizes.argmax())

    def close(self) -> None:
        self._files.close()

    def _bucket(self, row: int) -> Bucket:
        """The bucket of a row."""
        return next(Bucket.parse(b.bucket) for b in self.dataset.buckets if row < b.first + b.samples)

    def __reduce__(self) -> tuple[Any, ...]:  # open files stay where they are
        return Sidecar, (self.dataset, self.kind, self.facts)


def read_empty_text(dataset: Dataset) -> Tensor:
    """What text is replaced by when it is dropped, [L, D]."""
    header = _matching_manifest(dataset, "text").header
    path = dataset.folder / "text" / EMPTY_TEXT
    if not path.is_file():
        raise ShardError(f"{path} is missing; {REMEDY}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != header.empty_sha256:
        raise ShardError(f"{path} is damaged: its SHA-256 is not the one in {SIDECAR}; {REMEDY}")
    return parse_tensor("text", data, str(path))


def _matching_manifest(dataset: Dataset, kind: str) -> SidecarManifest:
    """The manifest of a sidecar, which must belong to the dataset as it is now."""
    suffix_of(kind)  # refuses names that are no kind
    folder = dataset.folder / kind
    if not (folder / SIDECAR).is_file():
        state = "is not finished" if folder.is_dir() else "is missing"
        raise ShardError(
            f"{folder} {state}: no {SIDECAR}; run `fw data encode {dataset.folder}`, which goes on where it was"
        )
    manifest = read_manifest(folder, kind)
    facts = [(line.shard, line.samples, line.source_sha256) for line in manifest.shards]
    wanted = [(line.shard, line.totals.samples, line.tar_sha256) for line in dataset.manifest.shards]
    if manifest.header.dataset_sha256 != dataset.manifest.header.rows_sha256 or facts != wanted:
        raise ShardError(
            f"{folder} was made for other samples than {dataset.folder} has now; remove that folder, or run "
            f"`fw data encode {dataset.folder}` with --replace"
        )
    return manifest
