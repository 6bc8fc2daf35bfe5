"""Being asked to stop: SIGTERM, SIGUSR1 and SIGINT, or a file named `stop` in the run's folder. Knows no torch."""

import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks for the file
FILE_SAYS = "the file "  # launch/slurm/common.sh looks for it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that a stop was asked for; the trainer looks at `requested` where it can stop, and ranks agree there.

    A second SIGINT ends the process at once. `folder` may be set later, when the run's folder is known.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.reason = ""  # what asked first: a signal's name, or the file
        self._pid = os.getpid()
        self._next_look = 0.0
        self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}

    @property
    def requested(self) -> bool:
        if not self.reason and self.folder is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            if os.path.exists(self.folder / "stop"):
                self.reason = f"{FILE_SAYS}{self.folder / 'stop'}"
        return bool(self.reason)

    def close(self) -> None:
        """Gives the signals back, and removes the file so that the next start runs."""
        for number, old in self._old.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)
        self._old = {}
        if self.folder is not None and self.requested:
            (self.folder / "stop").unlink(missing_ok=True)

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # Schedulers signal forked workers too. They must live on until the step is done; the trainer ends them.
        if os.getpid() != self._pid:
            return
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.reason = self.reason or signal.Signals(number).name


def asked_by(reasons: Sequence[str]) -> str:
    """Why the ranks stop, of what each was told: the file before any signal, for then the run shall not go on by itself."""
    for reason in reasons:
        if reason.startswith(FILE_SAYS):
            return reason
    told = [f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason]
    return told[0] if told else ""
