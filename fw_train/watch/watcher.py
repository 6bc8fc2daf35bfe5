"""Every rank tells where it is and looks after the others: who hangs is named, and who fails takes all along.

A thread of each rank writes `.watch/<start>/rank-K.json` every two seconds, over the file system that holds the run's folder: it
works where communication hangs, which is when it is needed. Ranks 0 and 1 look at all, the others at these two, so that
a hundred ranks cost the file server little. Durations are those of the observer's own clock.
"""

import contextlib
import faulthandler
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

from fw_train.atomic_files import replace_file
from fw_train.identity import Process, kill, process_from_json, state, this_process
from fw_train.run.folder import Status, current_token, write_status
from fw_train.watch.heartbeat import (
    Heartbeat,
    Place,
    Seen,
    Trace,
    Verdict,
    describe,
    from_json,
    judge_silence,
    judge_standstill,
    place_from_json,
    place_to_json,
    stack_of,
    to_json,
    where,
)

log = logging.getLogger(__name__)

FAILED = 1
HUNG = 3

PUBLISH_S = 2.0
LOOK_S = 0.5
OBSERVERS = 2
LEAVE_S = 3.0  # the failed rank waits so long for the others before it speaks last
PEER_S = 4.0  # an error of communication waits so long for the error behind it
BACKSTOP_S = 8.0  # whatever blocks the leave-taking
DUMP_CHARACTERS = 6000

COMMUNICATION = re.compile(
    r"gloo|nccl|connection|broken pipe|socket|timed out|rendezvous|store->|peer|process group", re.IGNORECASE
)


class Failure(NamedTuple):
    """What ends the run, as its first finder wrote it for all."""

    rank: int  # who says so
    code: int
    headline: str
    ranks: tuple[int, ...]  # who is to blame
    silent: tuple[Process, ...]


class Watch:
    """Make one on each rank once rank 0 has claimed the folder and all know it; `beat` wherever the main thread gets on."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        *,
        hang_s: float,
        first_step_s: float,
        stream: TextIO = sys.stderr,
        session: str | None = None,
    ) -> None:
        """`hang_s`: how long a rank may do nothing; `first_step_s`: the same until it has begun a second step; `session`:
        what this start alone has and all its ranks know, by default the token of the folder's lease."""
        self._folder, self.rank, self.world = folder, rank, world
        self._hang_s, self._first_step_s, self._stream = hang_s, first_step_s, stream
        self._publish_s = min(PUBLISH_S, hang_s / 6)
        token = session or current_token(folder)
        if token is None:
            raise ValueError(f"{folder} has no owner; rank 0 must claim it before its ranks are watched")
        self._token = token
        self._here = this_process()
        self._room = folder / ".watch" / token
        self._room.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for leftover in self._room.parent.iterdir():
                if leftover != self._room:
                    shutil.rmtree(leftover, ignore_errors=True)
        self._place = Place()
        self._number, self._left, self._written = 0, "", True
        self._publishing = threading.Lock()
        self._ending = threading.Lock()  # taken once, by the thread that ends this process
        self._closed = threading.Event()
        # Written by the main thread itself, in a signal's handler, when this interpreter is blocked: another thread would walk its
        # frames while it runs, as it does right after a suspension. Synchronous, so that other hosts see it.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_SYNC
        self._dump = os.open(self._room / f"rank-{rank}.stack", flags, 0o644)
        faulthandler.register(signal.SIGALRM, file=self._dump, all_threads=False)
        self._place_file = os.open(self._room / f"rank-{rank}.place", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._publish()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: int = -1, keys: Sequence[str] = ()) -> None:
        """The main thread gets on: with `phase`, at `step` (as before where it is left out), on samples `keys`."""
        at = self._place
        same = step < 0 or step == at.step
        self._place = Place(
            phase,
            at.step if same else step,
            at.in_step + 1 if same else 0,
            at.beats + 1,
            tuple(keys) or (at.keys if same else ()),
            at.steps_begun + (not same),
        )
        # Into the kernel's memory, from where it reaches the file even if this process is stopped or killed right after.
        with contextlib.suppress(OSError):
            os.pwrite(self._place_file, place_to_json(self._place), 0)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all ranks for an error of this one; the first error is shown last, and those that follow from it not at all."""
        if _of_communication(error):
            deadline = time.monotonic() + PEER_S
            while self._failure() is None and time.monotonic() < deadline:
                time.sleep(0.1)
        summary = _summary(error)
        headline = f"rank {self.rank} failed: {summary}"
        if self._take_lead():
            mine = Failure(self.rank, FAILED, headline, (self.rank,), ())
            first = self._publish_failure(mine)
            if first == mine:
                trace = "".join(traceback.format_exception(error))
                self._speak_last(mine, f"rank {self.rank} failed in {where(self._place)}\n{trace}")
            self._leave(first, also=summary)
        time.sleep(BACKSTOP_S)  # the watching thread ends this process
        os._exit(FAILED)

    def whereabouts(self, rank: int) -> str:
        """Where a rank is at the moment, with samples and stack, by its last sign of life; for a rank that is slow."""
        heartbeat = self._heartbeat(rank)
        return describe(heartbeat, "is here:") if heartbeat else f"rank {rank} has given no sign of life yet"

    def close(self) -> None:
        """Ends the signs of life; call it when all ranks have done their work, for who has closed looks after nobody."""
        self._closed.set()
        self._thread.join(PUBLISH_S)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._left = "closed"
        self._publish()

    def _run(self) -> None:
        look_s = min(LOOK_S, self._hang_s / 12)
        watched = range(self.world) if self.rank < OBSERVERS else range(min(OBSERVERS, self.world))
        started = last = time.monotonic()
        seen = {rank: Seen(started, started) for rank in watched}
        published = started - self._publish_s
        while not self._closed.wait(look_s):
            now = time.monotonic()
            # A thread that dies would look like a rank that hangs.
            try:
                if now - published >= self._publish_s:
                    self._publish()
                    published = now
                if now - last > self._hang_s / 4 or not self._written:
                    # This process was stopped, or the file system does not take what ranks write: not the others' fault.
                    for one in seen.values():
                        one.shift(now - last)
                last = now
                failure = self._failure()
                if failure is not None:
                    if self._take_lead():
                        self._leave(failure)
                    return
                verdict = self._look(seen, now)
                if verdict is not None and self._take_lead():
                    self._convict(verdict)
            except Exception:
                log.exception("rank %d could not look after the others", self.rank)

    def _look(self, seen: dict[int, Seen], now: float) -> Verdict | None:
        for rank, one in seen.items():
            heartbeat = self._heartbeat(rank)
            if heartbeat is not None:
                one.update(heartbeat, now)
        verdict = judge_silence(seen, now, self._hang_s, self._first_step_s, self._here, self._trace)
        if verdict is None and len(seen) == self.world:
            verdict = judge_standstill(seen, now, self._hang_s, self._first_step_s, 3 * self._publish_s)
        return verdict

    def _convict(self, verdict: Verdict) -> NoReturn:
        mine = Failure(self.rank, HUNG, verdict.headline, verdict.ranks, verdict.silent)
        first = self._publish_failure(mine)
        if first != mine:
            self._leave(first)
        self._speak_last(mine, f"{verdict.report}\nthe run ends, with code {HUNG}\n")

    def _speak_last(self, failure: Failure, words: str) -> NoReturn:
        """The way out of the rank whose word is published: waits until the others have taken leave."""
        _end_later(failure.code)
        deadline = time.monotonic() + LEAVE_S
        status = Status("failed", self._place.step, failure.headline)
        write_status(self._folder, self._token, status)
        self._say_threads(failure)
        others = [rank for rank in range(self.world) if rank != self.rank]
        while others and time.monotonic() < deadline:
            time.sleep(0.1)
            beats = {rank: self._heartbeat(rank) for rank in others}
            others = [rank for rank, hb in beats.items() if hb and not hb.left and hb.process not in failure.silent]
        write_status(self._folder, self._token, status)  # rank 0 may have been about to say that it runs
        self._say(words)
        self._exit(failure)

    def _leave(self, failure: Failure, also: str = "") -> NoReturn:
        """The quiet way out of all other ranks; the one that speaks last ends first, for launchers report the first."""
        _end_later(failure.code)
        deadline = time.monotonic() + LEAVE_S + 2 * LOOK_S
        self._say_threads(failure)
        self._say(f"{failure.headline}; rank {self.rank} ends{f', it failed too: {also}' if also else ''}\n")
        self._left = "leaves"
        self._publish()
        while time.monotonic() < deadline:
            speaker = self._heartbeat(failure.rank)
            if speaker is None or speaker.left == "closed" or state(speaker.process, self._here) == "gone":
                break
            time.sleep(0.1)
        self._exit(failure)

    def _exit(self, failure: Failure) -> NoReturn:
        for process in failure.silent:
            kill(process, self._here)
        self._left = "closed"
        self._publish()
        os._exit(failure.code)

    def _take_lead(self) -> bool:
        return self._ending.acquire(blocking=False)

    def _publish(self) -> None:
        """Writes this rank's sign of life, if the file system takes it."""
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        with self._publishing:
            self._number += 1
            heartbeat = Heartbeat(self.rank, self._here, self._number, self._place, stack_of(main), self._left)
            try:
                if os.fstat(self._dump).st_size:
                    os.ftruncate(self._dump, 0)  # a block that has passed
                if not self._left:
                    signal.setitimer(signal.ITIMER_REAL, self._hang_s / 2)
                replace_file(self._room / f"rank-{self.rank}.json", to_json(heartbeat))
            except OSError as error:
                log.log(
                    logging.WARNING if self._written else logging.DEBUG,
                    "no sign of life from rank %d: %s",
                    self.rank,
                    error,
                )
                self._written = False
            else:
                self._written = True

    def _heartbeat(self, rank: int) -> Heartbeat | None:
        try:
            return from_json((self._room / f"rank-{rank}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def _trace(self, rank: int) -> Trace:
        try:
            place = place_from_json((self._room / f"rank-{rank}.place").read_bytes())
        except (OSError, ValueError):  # never written, or caught in the middle of a change
            place = None
        try:
            dump = (self._room / f"rank-{rank}.stack").read_text(errors="replace")[-DUMP_CHARACTERS:]
        except OSError:
            dump = ""
        return Trace(place, dump)

    def _publish_failure(self, mine: Failure) -> Failure:
        """The failure that all ranks go by: this one, unless another was first."""
        try:
            descriptor = os.open(self._room / "failure.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(mine).encode())
        except FileExistsError:
            return self._failure() or mine
        except OSError as error:
            log.warning("rank %d cannot tell the others of its failure: %s", self.rank, error)
        return mine

    def _failure(self) -> Failure | None:
        file = self._room / "failure.json"
        for _ in range(20):  # it may be on its way to the disk
            try:
                rank, code, headline, ranks, silent = json.loads(file.read_bytes())
                return Failure(rank, code, headline, tuple(ranks), tuple(map(process_from_json, silent)))
            except OSError:
                return None
            except ValueError:
                time.sleep(0.1)
        return Failure(self.rank, FAILED, "a rank failed and could not write why", (), ())

    def _say_threads(self, failure: Failure) -> None:
        """All threads of a rank that hangs but can still speak: the main thread may wait for one of them."""
        if failure.code == HUNG and self.rank in failure.ranks:
            self._say(f"all threads of rank {self.rank}, most recent call first:\n")
            _attempt(lambda: faulthandler.dump_traceback(self._stream))

    def _say(self, words: str) -> None:
        def write() -> None:
            self._stream.write(words)
            self._stream.flush()

        _attempt(write)


def _attempt(action: Callable[[], None]) -> None:
    """Says something if it can: the reader of a pipe may be gone."""
    try:
        action()
    except (OSError, ValueError) as error:
        log.debug("not said: %s", error)


def _end_later(code: int) -> None:
    """Ends the process in a while even if a file system or a pipe blocks its leave-taking."""
    timer = threading.Timer(BACKSTOP_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _summary(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _of_communication(error: BaseException) -> bool:
    """Whether an error may only be the echo of another rank's end."""
    if isinstance(error, ConnectionError | TimeoutError | EOFError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"DistError"}) or (isinstance(error, RuntimeError) and bool(COMMUNICATION.search(str(error))))
