"""Ends what a launch has left on this host: processes that carry its id in their environment, and no others.

python -m launch.sweep ID                   prints one line for each process that it had to end
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

MARK = "FW_LAUNCH"
LOOKS = 3
LEAVE_S = 2.0  # what is about to end by itself may: DeepSpeed's launcher looks once a second


def main(launch: str) -> None:
    ended = dict[int, str]()
    deadline = time.monotonic() + LEAVE_S
    while carrying(launch) and time.monotonic() < deadline:
        time.sleep(0.1)
    # Looked for more than once: a process that is becoming another program has no environment for a moment.
    for _ in range(LOOKS):
        for pid, command in carrying(launch):
            ended[pid] = command
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    for pid, command in ended.items():
        print(f"{pid} {command}")


def carrying(launch: str) -> list[tuple[int, str]]:
    """Processes of this user that belong to the launch, and their commands."""
    wanted = f"{MARK}={launch}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        # Other users' processes are not readable; others end while one looks.
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append((int(entry.name), command.strip()[:200]))
    return found


if __name__ == "__main__":
    main(sys.argv[1])
