"""Work that the training loop does not wait for: done in order by one thread, and never a reason to end a run."""

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

WAITING = 1_000  # pieces of work; when a file system hangs for longer, what comes later is lost


class Background:
    """Errors of the system (a full disk, a lost mount) are told once each and then counted; the next piece is tried anyway."""

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose
        self.lost = 0
        self._told: set[str] = set()
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name=purpose, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._lose(f"{WAITING} writes are waiting already")

    def close(self, wait_s: float) -> None:
        """Waits for what was submitted, but not for a file system that has gone."""
        try:
            self._queue.put(None, timeout=wait_s)
        except queue.Full:
            return
        self._thread.join(wait_s)
        if self.lost or self._thread.is_alive():
            log.warning("%s: %d writes failed, %d were given up", self.purpose, self.lost, self._queue.qsize())

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception as error:  # whatever it is, weights are worth more than their curves
                self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, why: str) -> None:
        self.lost += 1
        if why not in self._told:
            self._told.add(why)
            log.warning("%s: not written: %s; training goes on", self.purpose, why)
