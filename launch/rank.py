"""Keeps one rank of a hostfile launch: its log, its end, and that it never outlives the launch.

    python -m launch.rank LAUNCH_FILE           (started by DeepSpeed on each host, once a rank)

DeepSpeed's launcher on a host can be killed and leaves its ranks behind; a connection can break and the ranks never hear of
it. This process stands between: it ends the rank when its own parent has ended, and when nobody reads its output any more,
which is what a broken connection looks like from here.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from launch.descendants import adopt_orphans, die_with_parent, kill_descendants
from launch.launch_file import Launch, log_file, read_launch
from launch.messages import Ended, ended, shown
from launch.outcome import write_failed

LOOK_S = 0.2
SAY_S = 5.0  # how long the last word may wait for a reader
PIECE = 4096  # a pipe that takes anything takes this much at once


def main(arguments: list[str]) -> int:
    file = Path(arguments[0])
    launch = read_launch(file)
    rank = int(os.environ["RANK"])
    adopt_orphans()
    # DeepSpeed signals the ranks itself and gives them 30 s; they save and end, and this process after them.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    path = log_file(Path(launch.output), rank)
    with path.open("ab") as log, path.open("rb") as written:
        log.write(f"---- launch {launch.id}, {datetime.now():%F %T}, on {socket.gethostname()}\n".encode())
        log.flush()
        written.seek(0, os.SEEK_END)
        code, why = _keep(file, launch, rank, log, written)
    end = Ended(rank, socket.gethostname(), code, why)
    _say(ended(launch.id, end), SAY_S)
    if rank == 0 and why:
        write_failed(launch, f"rank 0 was ended: {why}")
    return code if code >= 0 else 128 - code


def _keep(file: Path, launch: Launch, rank: int, log: BinaryIO, written: BinaryIO) -> tuple[int, str]:
    """Runs the rank to its end; its code, and what ended it if that came from outside."""
    parent = os.getppid()
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "fw_train.train", *launch.arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=_as_rank,
    )
    why, rest = "", b""
    while child.poll() is None:
        if os.getppid() != parent:
            why = "DeepSpeed's launcher on this host has ended"
        elif _writable() is None:
            why = "the connection to the launcher has ended"
        elif _gone(file):  # where the connection still seems to stand; see nodes.py
            why = "the launch is over"
        if why:
            child.kill()
            break
        if rank == 0:
            rest = _show(launch.id, rest + written.read())
        time.sleep(LOOK_S)
    code = child.wait()
    kill_descendants()  # workers of a rank that was killed
    if rank == 0:
        rest = _show(launch.id, rest + written.read())
        _show(launch.id, rest + b"\n" * bool(rest))
    return code, why


def _gone(file: Path) -> bool:
    try:
        file.stat()
    except FileNotFoundError:
        return True
    except OSError:  # a file server that does not answer is no end of the launch
        return False
    return False


def _as_rank() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(signal.SIGKILL)


def _show(launch: str, data: bytes) -> bytes:
    """Passes whole lines on to the terminal; what is left of the last one. While nobody takes them they wait."""
    while b"\n" in data and _writable():
        line, _, data = data.partition(b"\n")
        _say(shown(launch, line.decode(errors="replace").rstrip("\r")), 0)
    return data


def _say(line: str, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        writable = _writable()
        if writable or writable is None or time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    if writable:
        with contextlib.suppress(OSError):  # the reader may go at this very moment
            os.write(sys.stdout.fileno(), line.encode()[:PIECE])


def _writable() -> bool | None:
    """Whether the output takes more at the moment; None: its reader has gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    for _, events in poll.poll(0):
        return None if events & (select.POLLERR | select.POLLHUP) else True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
