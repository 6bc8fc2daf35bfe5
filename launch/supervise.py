"""Watches over a launch from the first process to the last one: who ends first takes all along, and a signal stops the run."""

import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from launch.descendants import adopt_orphans, kill_descendants
from launch.messages import Ended, HostLost, Other, Shown, read
from launch.outcome import Course

GRACE_S = 6.0  # the ranks agree on what has failed, write it down and leave; then they are ended
LEAVE_S = 30.0  # between the first rank that is done and the last one
LOST_S = 1.0  # after a host is lost: the others can only wait for it
TETHER_S = 3.0
LOOK_S = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Told:
    """Signals to the launcher: their names, as they came."""

    def __init__(self) -> None:
        self.names: list[str] = []
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(number).name)


def supervise(
    command: Sequence[str],
    environ: Mapping[str, str],
    launch: str,
    ranks: int,
    log: Path,
    told: Told,
    ask_to_stop: Callable[[], bool],
    stop_limit_s: float,
) -> Course:
    """Runs DeepSpeed's launcher until everything here has ended; `ask_to_stop` is False where nothing has begun."""
    adopt_orphans()
    tether = subprocess.Popen(
        [sys.executable, "-m", "launch.tether", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environ),
        start_new_session=True,  # Ctrl-C is for this process alone: DeepSpeed would kill what it finds by name
    )
    assert tether.stdout is not None
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(tether.stdout, lines), daemon=True).start()

    events: list[Ended | HostLost] = []
    said: deque[str] = deque(maxlen=100)
    deadline, reason, asked = float("inf"), "", False

    def end_by(limit_s: float, why: str) -> None:
        nonlocal deadline, reason
        if time.monotonic() + limit_s < deadline:
            deadline, reason = time.monotonic() + limit_s, why

    with log.open("a") as file:
        while time.monotonic() < deadline:
            if told.names and not asked:
                asked = True
                if ask_to_stop():
                    tell(f"{told.names[0]}: the run stops after its step, saved; once more ends it at once")
                    end_by(stop_limit_s, f"{told.names[0]}, and it had not stopped after {stop_limit_s:g} s")
                else:
                    end_by(0, f"{told.names[0]} before the run had begun")
            if len(told.names) > 1:
                end_by(0, f"{told.names[1]}, the second signal")
            try:
                line = lines.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            if line is None:
                break
            message = read(launch, line.decode(errors="replace"))
            if isinstance(message, Shown):
                show(message.text)
                continue
            file.write(f"{line.decode(errors='replace').rstrip()}\n")
            file.flush()
            if isinstance(message, Other):
                if "[INFO]" not in message.line:
                    said.append(message.line)
                continue
            events.append(message)
            if isinstance(message, HostLost) and message.broken:
                end_by(LOST_S, f"not all had ended {LOST_S:g} s after a host was lost")
            elif isinstance(message, HostLost) or message.code:
                end_by(GRACE_S, f"not all had ended {GRACE_S:g} s after the first one failed")
            else:
                end_by(LEAVE_S, f"not all had ended {LEAVE_S:g} s after the first one was done")
    overdue = time.monotonic() >= deadline
    tether.terminate()
    try:
        tether.wait(TETHER_S)
    except subprocess.TimeoutExpired:
        tether.kill()
        tether.wait()
    kill_descendants()
    return Course(tuple(events), tuple(said), reason if overdue else "")


def tell(words: str) -> None:
    """The launcher's own words."""
    show(f"launch: {words}")


def show(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:  # the terminal has gone; the logs stay
        sys.stdout = open("/dev/null", "w")  # noqa: SIM115


def _read_lines(stream: IO[bytes], lines: "queue.Queue[bytes | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
