"""What a run trains on: packed datasets, opened and checked, as streams of samples that may share a batch.

A stream is one bucket of one dataset, without the rows that its quarantine lists; the samples of a stream have one size, to
which they are cut and scaled.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fw_train.batch import latent_frames
from fw_train.data.augment import Augmentation
from fw_train.data.encodings import shared_facts
from fw_train.data.manifest import BucketRows, Dataset
from fw_train.data.order import Stream
from fw_train.data.quarantine import QUARANTINE, read_quarantine
from fw_train.data.samples import LATENT_KINDS
from fw_train.data.schema import SIZE_STEP, Bucket
from fw_train.data.sidecar import Sidecar
from fw_train.data.sidecar_files import difference
from fw_train.data.sidecar_tensor import KINDS, latent_shape
from fw_train.data.transform import nearest_size

log = logging.getLogger(__name__)

OF_PICTURES = ("clip", *LATENT_KINDS)  # sidecars made of the pictures, as the middle of the first frames shows them


@dataclass(frozen=True)
class SourceParams:
    """A packed dataset and its share of the steps."""

    path: str
    weight: float = 1.0
    name: str = ""  # seeds the order: keep it when the data moves; the folder's name by default


@dataclass(frozen=True)
class LoaderParams:
    """What is read of each sample, and by how many processes."""

    frames: int
    sizes_px: tuple[tuple[int, int], ...]  # height, width; a bucket takes the one whose shape is nearest
    latents: Literal["sidecar", "online"]
    members: tuple[str, ...]  # kinds of sidecars
    labels: bool = True  # depth, points and cameras
    video: bool = False  # for latents encoded online, or pictures
    text_tokens: int = 512
    workers: int = 2  # processes of this rank; 0 reads in the calling one
    prefetch: int = 2  # micro-batches that each process prepares ahead
    timeout_s: float = 120
    augmentation: Augmentation = field(default_factory=Augmentation)
    max_substituted: float = 1e-3  # share of unreadable samples that the trainer bears, over all ranks

    def check(self) -> None:
        """Refuses what cannot be read."""
        latent_frames(self.frames)
        for height, width in self.sizes_px:
            Bucket(height, width, self.frames).check()
        if not self.sizes_px:
            raise ValueError("sizes_px is empty; give at least one [height, width]")
        unknown = sorted(set(self.members) - set(KINDS))
        if unknown:
            raise ValueError(f"{unknown} are no kinds of sidecars; there are {', '.join(KINDS)}")
        if ("latent" in self.members) != (self.latents == "sidecar"):
            raise ValueError(
                f"latents {self.latents!r} and members {list(self.members)} contradict each other: latents come from the sidecar "
                "`latent`, or are encoded online and not read"
            )
        if self.workers < 0 or self.prefetch < 1 or self.timeout_s <= 0 or self.text_tokens < 1:
            raise ValueError(
                f"workers {self.workers} must be at least 0, prefetch {self.prefetch} and text_tokens {self.text_tokens} at "
                f"least 1, timeout_s {self.timeout_s} above 0"
            )
        fixed = [kind for kind in self.members if kind in OF_PICTURES]
        if fixed and self.augmentation.changes:
            raise ValueError(
                f"augmentation ({', '.join(self.augmentation.changes)}) does not reach {', '.join(fixed)}, which were encoded "
                "before from the middle of the first frames: pictures and labels would no longer fit them; switch it off, or "
                "encode online and leave those sidecars out"
            )


class StreamRows(NamedTuple):
    """Where the samples of a stream lie."""

    source: int
    bucket: Bucket
    to: tuple[int, int]  # the size that they are cut and scaled to
    rows: BucketRows
    skipped: NDArray[np.int64]  # ascending rows that are left out

    def row(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows [N] of the dataset for ids [N] within the stream."""
        # The k-th skipped row lies behind `skipped[k] - first - k` kept ones.
        behind = np.searchsorted(self.skipped - self.rows.first - np.arange(len(self.skipped)), ids, side="right")
        return self.rows.first + ids + behind


class Source(NamedTuple):
    """An opened dataset."""

    name: str
    dataset: Dataset
    sidecars: tuple[Sidecar, ...]
    quarantined: NDArray[np.int64]  # ascending rows


class OpenStreams(NamedTuple):
    """All sources, and the streams in them."""

    sources: tuple[Source, ...]
    streams: tuple[Stream, ...]
    rows: tuple[StreamRows, ...]  # of each stream
    facts: dict[str, Any]  # plain JSON: what must not change between the parts of a run


def open_streams(sources: Sequence[SourceParams], params: LoaderParams) -> OpenStreams:
    """Opens and checks everything; what cannot be used stops here and not at the first sample."""
    params.check()
    if not sources:
        raise ValueError("there is no dataset to train on; list at least one under data.sources")
    opened = tuple(_open(source, params) for source in sources)
    _check_alike(opened)
    _check_texts(opened, params.text_tokens)
    streams: list[Stream] = []
    rows: list[StreamRows] = []
    for number, (source, given) in enumerate(zip(opened, sources, strict=True)):
        found = _streams_of(number, source, params)
        total = sum(stream_size(stream) for stream in found)
        for stream in found:
            size = stream_size(stream)
            # A source's weight is shared out by size: its samples are all drawn equally often.
            streams.append(Stream(f"{source.name}/{stream.bucket}", size, given.weight * size / total))
        rows += found
    if not streams:
        raise ValueError(
            f"no clip of {', '.join(source.name for source in opened)} has the {params.frames} frames that this run trains on; "
            "lower data.frames or pack longer clips"
        )
    return OpenStreams(opened, tuple(streams), tuple(rows), _facts(opened, streams))


def stream_size(stream: StreamRows) -> int:
    """How many samples a stream has."""
    return stream.rows.samples - len(stream.skipped)


def fingerprint(facts: dict[str, Any]) -> str:
    """The hash of the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _open(source: SourceParams, params: LoaderParams) -> Source:
    dataset = Dataset(source.path)
    sidecars = tuple(Sidecar(dataset, kind) for kind in params.members)
    keys = sorted({entry.key for entry in read_quarantine(dataset.folder)})
    quarantined = dataset.find_all(keys)
    if len(quarantined) < len(keys):
        log.warning(
            "%s: %d of its %d keys are not in the dataset",
            dataset.folder / QUARANTINE,
            len(keys) - len(quarantined),
            len(keys),
        )
    return Source(source.name or Path(source.path).resolve().name, dataset, sidecars, quarantined)


def _check_alike(sources: Sequence[Source]) -> None:
    """Numbers of one kind must come from one encoder, whatever their source."""
    for same_kind in zip(*(source.sidecars for source in sources), strict=True):
        first, *others = same_kind
        for other in others:
            wanted, found = shared_facts(first.facts), shared_facts(other.facts)
            if wanted != found:
                raise ValueError(
                    f"{first.folder} and {other.folder} were not made alike ({difference(wanted, found)}); encode one of them "
                    "again with --replace"
                )


def _check_texts(sources: Sequence[Source], tokens: int) -> None:
    """Refuses a longest text that the network would not take: every sample like it would count as unreadable."""
    for source in sources:
        for sidecar in (s for s in source.sidecars if s.kind == "text"):
            row = sidecar.largest(without=source.quarantined)
            try:
                found = len(sidecar.read(row)["text"])
            except (ValueError, OSError):  # a damaged one is the loader's to replace
                continue
            if found > tokens:
                raise ValueError(
                    f"{sidecar.folder}: the text of {source.dataset.sample(row).key} has {found} tokens, data.text_tokens is "
                    f"{tokens}; raise that"
                )


def _streams_of(number: int, source: Source, params: LoaderParams) -> list[StreamRows]:
    found = []
    for rows in source.dataset.buckets:
        bucket = Bucket.parse(rows.bucket)
        within = (source.quarantined >= rows.first) & (source.quarantined < rows.first + rows.samples)
        stream = StreamRows(
            number,
            bucket,
            nearest_size(bucket.height, bucket.width, params.sizes_px),
            rows,
            source.quarantined[within],
        )
        if bucket.frames < params.frames:
            log.warning(
                "%s/%s: its %d clips are shorter than %d frames and left out",
                source.name,
                bucket,
                rows.samples,
                params.frames,
            )
        elif not stream_size(stream):
            log.warning("%s/%s: all %d clips are in quarantine", source.name, bucket, rows.samples)
        else:
            for sidecar in source.sidecars:
                if sidecar.kind in LATENT_KINDS:
                    _check_encoded(sidecar, stream, params.frames)
            found.append(stream)
    return found


def _check_encoded(sidecar: Sidecar, stream: StreamRows, frames: int) -> None:
    """Refuses latents of another size, or of fewer frames, than this run trains on."""
    _, found, height, width = latent_shape(sidecar.facts, stream.bucket)
    size = height * SIZE_STEP // 2, width * SIZE_STEP // 2
    if size != stream.to:
        raise ValueError(
            f"{sidecar.folder}: clips of {stream.bucket} were encoded at {size[0]}x{size[1]} (height x width), this run trains "
            f"at {stream.to[0]}x{stream.to[1]}; run `fw data encode --size {stream.to[0]}x{stream.to[1]} --replace`, or set "
            f"data.sizes_px to [[{size[0]},{size[1]}]]"
        )
    if found < latent_frames(frames):
        raise ValueError(
            f"{sidecar.folder}: clips of {stream.bucket} were encoded to {found} latent frames, {frames} frames need "
            f"{latent_frames(frames)}; run `fw data encode --frames {frames} --replace`, or lower data.frames"
        )


def _facts(sources: Sequence[Source], streams: Sequence[Stream]) -> dict[str, Any]:
    return {
        "streams": [list(stream) for stream in streams],
        "sources": {
            source.name: {
                "samples_sha256": source.dataset.manifest.header.rows_sha256,
                "quarantined": len(source.quarantined),
                "quarantined_sha256": hashlib.sha256(source.quarantined.astype("<i8").tobytes()).hexdigest(),
                "sidecars": {sidecar.kind: sidecar.fingerprint for sidecar in source.sidecars},
            }
            for source in sources
        },
    }
