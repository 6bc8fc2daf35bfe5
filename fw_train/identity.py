"""Which process this is, and whether another one still lives; answers only about processes of this very machine."""

import os
import signal
import socket
from pathlib import Path
from typing import Any, NamedTuple


class Process(NamedTuple):
    """A process for good: its number alone is given to another one after its end."""

    host: str
    machine: str  # this boot of this kernel, and the namespace that process numbers count in
    pid: int
    started: int  # clock ticks after the boot

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Process:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # Two containers may share the host's name, and count their processes from 1 each.
    machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    _, started = _stat(os.getpid()) or ("R", 0)
    return Process(socket.gethostname(), machine, os.getpid(), started)


def process_from_json(value: Any) -> Process:
    host, machine, pid, started = value
    return Process(str(host), str(machine), int(pid), int(started))


def state(process: Process, here: Process) -> str | None:
    """`gone`, or the kernel's letter for what a process does (R runs, T is stopped, ...); None: it is on another machine."""
    if (process.host, process.machine) != (here.host, here.machine):
        return None
    letter, started = _stat(process.pid) or ("X", 0)
    return "gone" if letter in "XZ" or started != process.started else letter


def kill(process: Process, here: Process) -> None:
    """Ends a process that cannot leave by itself, where it runs on this machine and is still the same one."""
    if state(process, here) not in (None, "gone"):
        os.kill(process.pid, signal.SIGKILL)


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        )  # the name may hold spaces and brackets
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])
