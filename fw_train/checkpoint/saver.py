"""Saving in the background: the loop waits for a copy to host memory, a thread writes, and rank 0 commits.

    saver = CheckpointSaver(output, world, SaveParams(keep_last=3), resumed_step=step)
    if broadcast(saver.due(step, now_s)):         # rank 0's answer, with the loop's other flags
        saver.save(step, engine.fragments(), state, weights)
    ...
    saver.wait()                                  # before the run ends

Every rank writes its own files into a staging folder that all see; its index, which appears whole or not at all, says that
its data are on the disk. Rank 0 waits for all indexes, writes the manifest and renames the folder. The threads talk through
the folder alone: collectives of a second thread would deadlock with those of the training loop.
"""

import json
import logging
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fw_train.atomic_files import sync
from fw_train.checkpoint.fragments import checked_pieces, data_size
from fw_train.checkpoint.layout import STAGING, FileRecord, Manifest, checkpoints_folder, scan, state_tree, weights_name
from fw_train.checkpoint.retention import remove_superseded
from fw_train.checkpoint.run_state import RunState
from fw_train.checkpoint.schedule import SaveSchedule
from fw_train.checkpoint.writing import (
    HostCopies,
    await_ranks,
    clear_leftovers,
    commit,
    give_up,
    report_failure,
    seal,
    write_rank,
)
from fw_train.dist import World, gather_texts
from fw_train.engine.base import Fragment
from fw_train.weights.files import CheckpointError
from fw_train.weights.stage import StageInfo, new_stage_weights, stage_weights_content

log = logging.getLogger(__name__)


class CheckpointsFailing(RuntimeError):
    """No checkpoint could be written for longer than the run may go on without one."""


@dataclass(frozen=True)
class SaveParams:
    every_steps: int = 1_000
    every_s: float = 0.0  # 0: by steps alone
    keep_last: int = 3
    keep_every: int = 0  # multiples of this many steps stay; 0: none
    retry_s: float = 60.0  # after a save that failed
    max_unsaved_s: float = 7_200.0  # training goes on so long while saves fail
    deadline_s: float = 1_800.0  # for all ranks to have written


class StageWeights(NamedTuple):
    """The trainable weights that become `step-N.safetensors`; on rank 0."""

    tensors: Mapping[str, Tensor]
    info: StageInfo


class Started(NamedTuple):
    """What a call of `save` did."""

    started: bool  # False: put off, with the reason in the log
    stall_s: float  # how long the loop stood still


class Outcome(NamedTuple):
    """How a save ended."""

    step: int
    path: Path | None  # None: it failed
    bytes_written: int  # of all ranks, step-N.safetensors included
    seconds: float
    error: str = ""


class CheckpointSaver:
    """`save` and `wait` are for all ranks together; `due` and `poll` are rank 0's; `close` is for each by itself."""

    def __init__(
        self,
        output: Path,
        world: World,
        params: SaveParams,
        resumed_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._output, self._folder = output, checkpoints_folder(output)
        self._world, self._params, self._clock = world, params, clock
        self._schedule = SaveSchedule(params.every_steps, params.every_s, params.retry_s, resumed_step, clock())
        self._host = HostCopies()
        self._thread: threading.Thread | None = None
        self._result: Outcome | None = None  # of the thread
        self._give_up = threading.Event()
        self._outcome: Outcome | None = None
        self._told = True  # whether `poll` has given the outcome
        self._unsaved_since: float | None = None
        self._failures = 0
        self._token, self._save_number = self._meet()

    def due(self, step: int, now_s: float) -> bool:
        """On rank 0: whether to save after `step` steps; clocks differ, so its answer is broadcast."""
        self._collect()
        if self._thread is not None:
            return self._unsaved_for() > self._params.max_unsaved_s  # `save` then ends the run
        return self._schedule.due(step, now_s)

    def poll(self) -> Outcome | None:
        """On rank 0: how the last save ended, once; for the log."""
        self._collect()
        if self._told:
            return None
        self._told = True
        return self._outcome

    def save(
        self, step: int, fragments: Sequence[Fragment], state: RunState, weights: StageWeights | None = None
    ) -> Started:
        """Copies and returns; all ranks together, between steps. Put off while the save before is still being written."""
        began = time.perf_counter()
        if (state.step, state.world_size) != (step, self._world.size):
            raise CheckpointError(
                f"the state of step {state.step} on {state.world_size} ranks cannot be saved as step {step} on "
                f"{self._world.size}"
            )
        pieces, tree = checked_pieces(fragments), state_tree(state)
        needed = data_size(sum(piece.numel for piece in pieces))
        if weights is not None:
            stage_weights_content(weights_name(step), weights.tensors, weights.info)
            needed += sum(tensor.nbytes for tensor in weights.tensors.values())
        problem = self._agree(step, needed)
        if problem:
            log.warning("step %d is not saved now: %s", step, problem)
            return Started(False, time.perf_counter() - began)
        snapshot = self._host.flat(fragments)
        copied = weights and weights._replace(tensors=self._host.named(weights.tensors))
        staging, rng = self._staging(), state.rng or {}

        def work() -> None:
            started = time.perf_counter()
            error, path, written = "", None, 0
            try:
                write_rank(staging, self._world.rank, pieces, snapshot, rng)
                if self._world.rank == 0:
                    path, written = self._finish(step, staging, tree, copied)
            except Exception as problem:  # whatever it is, training goes on and the run hears of it
                error = f"{type(problem).__name__}: {problem}"
                if not isinstance(problem, OSError):
                    log.exception("saving step %d", step)
                if self._world.rank == 0:
                    give_up(staging)
                else:
                    report_failure(staging, self._world.rank, error)
            self._result = Outcome(step, path, written, time.perf_counter() - started, error)

        self._give_up.clear()
        self._schedule.started(step, self._clock())
        self._thread = threading.Thread(target=work, name=f"save step {step}", daemon=True)
        self._thread.start()
        stall_s = time.perf_counter() - began
        log.info("saving step %d in the background; training stood still for %.3f s", step, stall_s)
        return Started(True, stall_s)

    def wait(self, still_waiting: Callable[[], None] = lambda: None) -> Outcome | None:
        """Returns when the last save has been committed or has failed, with how it ended; all ranks together.

        `still_waiting` is called every second: a slow disk is no rank that hangs.
        """
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1.0)
            still_waiting()
        self._collect()
        outcome = json.loads(gather_texts(json.dumps(self._outcome, default=str))[0])
        return Outcome(*outcome)._replace(path=Path(outcome[1]) if outcome[1] else None) if outcome else None

    def close(self, timeout_s: float = 0.0) -> None:
        """Gives an unfinished save up after so long; the thread never keeps the process alive."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._give_up.set()

    def _meet(self) -> tuple[str, int]:
        """Rank 0's name for this run's staging folders and the number of its last save, once all see the folder."""
        token, number = secrets.token_hex(4), 0
        if self._world.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            sync(self._output)
            number = max((found.manifest.save_number for found in scan(self._folder).checkpoints), default=0)
            (self._folder / f"{STAGING}{token}-0").mkdir()
        token, number = json.loads(gather_texts(json.dumps([token, number]))[0])
        probe = self._folder / f"{STAGING}{token}-0"
        hosts = gather_texts("" if probe.is_dir() else socket.gethostname())
        blind = [f"{rank} on {host}" for rank, host in enumerate(hosts) if host]
        if self._world.rank == 0:
            probe.rmdir()
        if blind:
            raise CheckpointError(
                f"{self._folder} is not the same folder for all ranks: rank {', '.join(blind[:8])} does not see what rank 0 "
                "makes there; put run.output on a file system that all hosts share"
            )
        return token, number

    def _agree(self, step: int, needed: int) -> str:
        """Rank 0's reason for not saving now, the same on every rank; '' and an empty staging folder otherwise."""
        self._collect()
        reports = [json.loads(text) for text in gather_texts(json.dumps([self._thread is not None, needed]))]
        busy = [rank for rank, (is_busy, _) in enumerate(reports) if is_busy]
        problem, fatal = "", ""
        if self._world.rank == 0:
            if self._unsaved_for() > self._params.max_unsaved_s:
                fatal = (
                    f"no checkpoint could be written for {self._unsaved_for():.0f} s ({self._failures} attempts failed); "
                    f"{self._situation()}: free some space and resume"
                )
            elif busy:
                problem = f"the save before is still being written by the ranks {busy}"
            else:
                problem = self._prepare(step, sum(size for _, size in reports))
        problem, fatal = json.loads(gather_texts(json.dumps([problem, fatal]))[0])
        if fatal:
            raise CheckpointsFailing(fatal)
        if not problem:
            self._save_number += 1
        return problem

    def _prepare(self, step: int, needed: int) -> str:
        """Makes the staging folder of the next save; '' or what stands in the way."""
        if self._unsaved_since is None:
            self._unsaved_since = self._clock()
        try:
            clear_leftovers(self._folder)
            free = shutil.disk_usage(self._folder).free
            if free < needed:
                raise OSError(f"{needed / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB are free")
            self._staging(1).mkdir()
        except OSError as error:
            self._take(Outcome(step, None, 0, 0.0, str(error)))
            return str(error)
        return ""

    def _staging(self, ahead: int = 0) -> Path:
        return self._folder / f"{STAGING}{self._token}-{self._save_number + ahead}"

    def _finish(self, step: int, staging: Path, tree: dict, weights: StageWeights | None) -> tuple[Path, int]:
        """Rank 0's part after its own files: step-N.safetensors, everybody's index, the commit, making room."""
        record = None
        with ExitStack() as stack:
            # The weights get their name when all else is on the disk: saves that fail leave no files of weights behind.
            if weights is not None:
                file = self._output / weights_name(step)
                written = stack.enter_context(new_stage_weights(file, weights.tensors, weights.info))
                record = FileRecord(file.name, *written)
            files = await_ranks(staging, self._world.size, self._params.deadline_s, self._give_up)
            manifest = Manifest(step, self._save_number, files, record, tree)
            seal(staging, manifest)
        path = commit(staging, self._folder, manifest)
        try:
            remove_superseded(self._folder, self._params.keep_last, self._params.keep_every)
        except OSError as error:
            log.warning("%s: superseded checkpoints could not be removed: %s", self._folder, error)
        return path, sum(entry.size for entry in files) + (record.size if record else 0)

    def _collect(self) -> None:
        """Takes over how the background save ended, if it has."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread.join()
        self._thread = None
        if self._world.rank == 0 and self._result is not None:
            self._take(self._result)

    def _take(self, outcome: Outcome) -> None:
        self._outcome, self._told = outcome, False
        if outcome.path is not None:
            self._unsaved_since, self._failures = None, 0
            log.info("saved %s: %.3f GB in %.1f s", outcome.path, outcome.bytes_written / 1e9, outcome.seconds)
            return
        self._failures += 1
        self._schedule.failed(self._clock())
        log.error(
            "step %d could not be saved (attempt %d): %s; %s. Training goes on, for up to %.0f s without a checkpoint, "
            "and saving is tried again after %.0f s: free some space",
            outcome.step, self._failures, outcome.error, self._situation(),
            self._params.max_unsaved_s, self._params.retry_s,
        )  # fmt: skip

    def _unsaved_for(self) -> float:
        """Seconds since the first save that has not been made good."""
        return 0.0 if self._unsaved_since is None else self._clock() - self._unsaved_since

    def _situation(self) -> str:
        """Free space and the last good checkpoint."""
        try:
            free = f"{shutil.disk_usage(self._output).free / 1e9:.3f} GB are free at {self._output}"
            checkpoints = scan(self._folder).checkpoints
        except OSError as error:
            return f"{self._output} cannot be read ({error})"
        last = f"the last good checkpoint is {checkpoints[0].path}" if checkpoints else "there is no earlier checkpoint"
        return f"{free}; {last}"
