"""Reads the samples of a micro-batch, wherever that happens; one that cannot be read has a substitute by its position."""

from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from fw_train.data.arena import NO_SLOT, Arena, SlotWriter
from fw_train.data.augment import draw_view
from fw_train.data.coded import CodedBatch, InSlot, Substituted, to_slot
from fw_train.data.samples import CodedSample, SampleReader, Wanted
from fw_train.data.streams import LoaderParams, OpenStreams, StreamRows, stream_size

ATTEMPTS = 8  # rows that are tried for one position
LABEL_BYTES = 4 * 4 + 2 + 1  # of a pixel: depth, x, y, z in float32, two masks, and some more for what surrounds them
SIDECAR_BYTES = 1 << 26  # of a sample: latents and image latents of 81 frames at 720x1280 take 20 MB, a text 4 MB


class Request(NamedTuple):
    """The samples of a micro-batch."""

    step: int
    micro_step: int
    stream: int
    rows: tuple[int, ...]
    positions: tuple[int, ...]
    slot: int = NO_SLOT  # of the arena, where the batch is to be written


class TooManyUnreadable(RuntimeError):
    """A sample and all its substitutes cannot be read: the data is gone, not a sample."""


class Fetcher:
    """Reads what requests ask for; a copy of it lives in each loader process."""

    def __init__(self, opened: OpenStreams, params: LoaderParams, seed: int) -> None:
        wanted = Wanted(params.members, params.labels, params.video, params.text_tokens)
        self._readers = [SampleReader(source.dataset, source.sidecars, wanted) for source in opened.sources]
        self._streams, self._params, self._seed = opened.rows, params, seed

    def fetch(self, request: Request, writer: SlotWriter | None = None) -> CodedBatch:
        """The batch of a request, its large arrays where `writer` puts them."""
        samples: list[CodedSample] = []
        substituted: list[Substituted] = []
        for row, position in zip(request.rows, request.positions, strict=True):
            samples.append(self._read(self._streams[request.stream], row, position, substituted, writer))
        return CodedBatch(
            request.step,
            request.micro_step,
            request.positions,
            tuple(samples),
            tuple(substituted),
            self._params.text_tokens,
        )

    def _read(
        self, stream: StreamRows, row: int, position: int, substituted: list[Substituted], writer: SlotWriter | None
    ) -> CodedSample:
        """The sample of a row, or the first substitute that can be read."""
        params, reader = self._params, self._readers[stream.source]
        view = draw_view(stream.bucket, params.frames, stream.to, params.augmentation, self._seed, position)
        start = writer.used if writer else 0
        for attempt in range(ATTEMPTS):
            try:
                return reader.read(row, stream.bucket, view, writer.empty if writer else np.empty)
            except (ValueError, OSError) as error:  # of this sample: all that is shared was checked at the start
                substituted.append(Substituted(reader.key(row), str(error)))
            if writer:
                writer.used = start
            row = substitute_row(stream, self._seed, position, attempt)
        reasons = "; ".join(f"{key}: {reason}" for key, reason in substituted[-ATTEMPTS:])
        raise TooManyUnreadable(
            f"the sample at position {position} and {ATTEMPTS - 1} substitutes from {reader.dataset.folder} cannot be read; is "
            f"the storage there? `fw data verify {reader.dataset.folder}` lists what is damaged. {reasons}"
        )


class SlotFetcher:
    """The Fetcher as a loader process has it, which sends batches through the arena."""

    def __init__(self, fetcher: Fetcher, arena: Arena) -> None:
        self._fetcher, self._arena = fetcher, arena

    def __getitem__(self, request: Request) -> InSlot:
        writer = self._arena.writer(request.slot)
        return to_slot(self._fetcher.fetch(request, writer), request.slot, writer)


def slot_bytes(opened: OpenStreams, params: LoaderParams, micro_batch: int) -> int:
    """Room for any micro-batch, lossless labels and all: of what is not written to, nothing is taken."""
    pixels = max(stream.bucket.height * stream.bucket.width for stream in opened.rows) * params.frames
    labels = pixels * LABEL_BYTES if params.labels else 0
    return micro_batch * (labels + (2 * pixels if params.video else 0) + SIDECAR_BYTES)


def substitute_row(stream: StreamRows, seed: int, position: int, attempt: int) -> int:
    """The row that stands in at a position, the same on every machine."""
    digest = blake2b(f"{seed}/substitute/{position}/{attempt}".encode(), digest_size=8).digest()
    return int(stream.row(np.array([int.from_bytes(digest, "little") % stream_size(stream)]))[0])


def too_many(substituted: int, drawn: int, max_fraction: float) -> bool:
    """Whether a run should stop; counts are over all ranks, from the start of the run. One is always borne."""
    return substituted > max(1.0, max_fraction * drawn)
