"""Training data: packed datasets, the order of their samples, and processes that read them ahead.

    data = TrainingData([SourceParams("/data/indoor", weight=3.0), SourceParams("/data/outdoor")], params, seed)
    for coded in data.batches(segments, first_step, last_step, rank=rank, world=world, micro_batch=1):
        batch = expand_batch(coded, device, torch.bfloat16)

Which samples a step takes follows from `order.py` alone; processes are told rows and positions and know nothing else, so
their number changes nothing. They are forked from a server that was started clean and holds neither CUDA nor threads of a
process group; a plain fork would inherit both in an undefined state, and a spawn would import everything once for each.

Frame rates may differ between samples of a batch: frames are counted, and what they last is not given to the network.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from fw_train.data.arena import NO_SLOT, Arena
from fw_train.data.augment import Augmentation
from fw_train.data.coded import CodedBatch, InSlot, Substituted, from_slot
from fw_train.data.encodings import Encodings, shared_facts
from fw_train.data.expand import expand_batch, expand_video, pad_text
from fw_train.data.fetch import Fetcher, Request, SlotFetcher, TooManyUnreadable, slot_bytes, too_many
from fw_train.data.order import SampleOrder, accumulation_steps, rank_slice
from fw_train.data.quarantine import QUARANTINE
from fw_train.data.sidecar import read_empty_text
from fw_train.data.streams import LoaderParams, SourceParams, StreamRows, fingerprint, open_streams, stream_size

__all__ = [
    "Augmentation",
    "CodedBatch",
    "LoaderParams",
    "SourceParams",
    "Substituted",
    "TooManyUnreadable",
    "TrainingData",
    "expand_batch",
    "expand_video",
    "too_many",
]

log = logging.getLogger(__name__)


class TrainingData:
    """All sources of a run, opened; lives in the main process."""

    def __init__(self, sources: Sequence[SourceParams], params: LoaderParams, seed: int) -> None:
        self.params, self.seed = params, seed
        if params.workers:
            _start_server()
        opened = open_streams(sources, params)
        self.sources, self.streams = opened.sources, opened.streams
        self.facts = opened.facts  # kept in checkpoints: a resume with others would train on other samples
        self.fingerprint = fingerprint(opened.facts)
        # Those of all sources, which were found to be alike.
        self.encodings: Encodings = {s.kind: shared_facts(s.facts) for s in opened.sources[0].sidecars}
        self._opened, self._rows = opened, opened.rows
        self._fetcher = Fetcher(opened, params, seed)
        # Texts of all sources come from one encoder, so any source's empty text will do.
        has_text = "text" in params.members
        self.empty_text = pad_text(read_empty_text(opened.sources[0].dataset), params.text_tokens) if has_text else None

    def rows(self, stream: int) -> NDArray[np.int64]:
        """All rows of a stream, in the order of its ids."""
        return self._rows[stream].row(np.arange(stream_size(self._rows[stream])))

    def source_of(self, stream: int) -> int:
        """The number of the source that a stream belongs to."""
        return self._rows[stream].source

    def batches(
        self,
        segments: Sequence[Sequence[int]],
        first_step: int,
        last_step: int,
        *,
        rank: int,
        world: int,
        micro_batch: int,
    ) -> Generator[CodedBatch, None, None]:
        """A rank's micro-batches from `first_step` up to, not including, `last_step`: all of a step, then those of the next.

        Closing the iterator ends the processes.
        """
        order = SampleOrder(self.seed, self.streams, segments)
        requests = _Requests(self._rows, order, (first_step, last_step), rank, world, micro_batch)
        requests.check()
        found = (
            self._from_processes(requests, micro_batch) if self.params.workers else map(self._fetcher.fetch, requests)
        )
        return self._logged(found)

    def sample_batch(self, source: int, rows: Sequence[int], positions: Sequence[int]) -> CodedBatch:
        """Some rows of a source that are in one stream, as a validation set takes them; step and micro-step are 0."""
        holding = [
            number
            for number, stream in enumerate(self._rows)
            if stream.source == source
            and all(0 <= row - stream.rows.first < stream.rows.samples and row not in stream.skipped for row in rows)
        ]
        if not holding or not len(rows):
            raise ValueError(
                f"rows {list(rows)} of source {source} are not in one stream; take them from `rows(stream)`"
            )
        request = Request(0, 0, holding[0], tuple(map(int, rows)), tuple(map(int, positions)))
        return next(self._logged(iter([self._fetcher.fetch(request)])))

    def _from_processes(self, requests: "_Requests", micro_batch: int) -> Iterator[CodedBatch]:
        params = self.params
        # As many as are under way, and two that the trainer may hold.
        arena = Arena(params.workers * params.prefetch + 2, slot_bytes(self._opened, params, micro_batch))
        requests.arena = arena
        loader: DataLoader[InSlot] = DataLoader(
            SlotFetcher(self._fetcher, arena),  # type: ignore[arg-type]  # indexed by requests
            batch_size=None,
            sampler=requests,
            collate_fn=_as_it_is,
            num_workers=params.workers,
            prefetch_factor=params.prefetch,
            timeout=params.timeout_s,
            worker_init_fn=_begin_worker,
            multiprocessing_context=_context(),
            generator=torch.Generator(),  # it draws a seed that nothing uses; not from the global generator
        )
        iterator = iter(loader)
        try:
            for sent in iterator:
                batch = from_slot(sent, arena)
                yield batch.pin_memory() if torch.cuda.is_available() else batch
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise RuntimeError(
                f"the loader processes gave no batch for {params.timeout_s:g} s; raise data.timeout_s if the storage is slow, and "
                "see whether it answers: a process that waits for it cannot say so"
            ) from error
        finally:
            del iterator  # ends the processes

    def _logged(self, batches: Iterator[CodedBatch]) -> Generator[CodedBatch, None, None]:
        for batch in batches:
            for key, reason in batch.substituted:
                log.warning(
                    "step %d: sample %s cannot be read, another of its stream takes its place (%s); a line for it in %s leaves "
                    "it out for good",
                    batch.step,
                    key,
                    reason,
                    QUARANTINE,
                )
            yield batch


class _Requests:
    """What a rank reads, in order; iterated in the main process, ahead of the batches."""

    def __init__(
        self,
        rows: Sequence[StreamRows],
        order: SampleOrder,
        steps: tuple[int, int],
        rank: int,
        world: int,
        micro_batch: int,
    ) -> None:
        self._rows, self._order, self._steps = rows, order, steps
        self._rank, self._world, self._micro_batch = rank, world, micro_batch
        self.arena: Arena | None = None

    def check(self) -> None:
        """Refuses a world that does not fit any of the global batches, before anything is read."""
        for _, global_batch in self._order.segments:
            self._slices(global_batch)

    def _slices(self, global_batch: int) -> list[slice]:
        """The rank's part of a step, by micro-step."""
        world, micro_batch = self._world, self._micro_batch
        count = accumulation_steps(global_batch, world, micro_batch)
        layout = {"rank": self._rank, "world": world, "micro_batch": micro_batch, "accumulate": count}
        return [rank_slice(global_batch, **layout, micro_step=micro_step) for micro_step in range(count)]

    def __iter__(self) -> Iterator[Request]:
        for step in range(*self._steps):
            stream, ids, positions = self._order.step_ids(step)
            rows = self._rows[stream].row(ids)
            for micro_step, part in enumerate(self._slices(len(ids))):
                slot = self.arena.take() if self.arena else NO_SLOT
                yield Request(
                    step, micro_step, stream, tuple(rows[part].tolist()), tuple(positions[part].tolist()), slot
                )


def _start_server() -> None:
    """Its imports take longer than opening a million samples, and are done meanwhile."""
    _context()
    forkserver.ensure_running()


def _context() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, and shared by all processes
    return context


def _begin_worker(_: int) -> None:
    """A process that ends with the one it works for, leaves Ctrl-C to it, and takes one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # Its parent by number is the fork server, which outlives a killed trainer for as long as its children live.
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()


def _end_with(trainer: multiprocessing.process.BaseProcess) -> None:
    trainer.join()
    os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch
