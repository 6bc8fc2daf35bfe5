"""How a launch has ended: its run's status.json decides, and what its ranks and hosts did says why."""

import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fw_train.run.folder import State, Status, current_token, read_status, write_status
from launch.hostfile import Host
from launch.launch_file import Launch, log_file
from launch.messages import Ended, HostLost

LINES = 15


class Course(NamedTuple):
    """What the launcher saw, in this order."""

    events: tuple[Ended | HostLost, ...]
    said: tuple[str, ...]  # last words of all other programs
    ended_for: str  # why the launcher ended it; empty: it ended by itself


class Verdict(NamedTuple):
    code: int
    words: str


def own_status(launch: Launch) -> Status | None:
    """What the run says of itself; None: it never came to own its folder, and what stands there is of an earlier start."""
    output = Path(launch.output)
    return read_status(output) if current_token(output) != launch.before else None


def write_failed(launch: Launch, reason: str, states: Sequence[State] = ("running",)) -> None:
    """What a run that was killed could not write any more."""
    status = own_status(launch)
    if status and status.state in states:
        output = Path(launch.output)
        write_status(output, current_token(output), Status("failed", status.step, reason))


def judge(launch: Launch, hosts: Sequence[Host], course: Course) -> Verdict:
    """The launcher's exit code and last words, once all processes have gone."""
    status = own_status(launch)
    ranks = sum(host.slots for host in hosts)
    bad = [event for event in course.events if not (isinstance(event, Ended) and event.code == 0)]
    clean = not bad and len(course.events) == ranks and not course.ended_for
    # Both are written once all ranks have saved and met; what happens to one of them after that costs nothing.
    late = "" if clean else "; afterwards, " + (_event(bad[0]) if bad else course.ended_for or "a rank gave no word")
    if status and status.state == "finished":
        return Verdict(0, f"finished at step {status.step}{late}")
    if status and status.state == "stopped":
        return Verdict(0, f"stopped at step {status.step} ({status.reason}); the same command goes on from there{late}")
    words = _failure(launch, hosts, course, bad, status)
    # The other ranks saw only that a connection broke; from here one sees which process ended first.
    by_force = bool(bad) and (isinstance(bad[0], HostLost) or bad[0].code < 0 or bool(bad[0].why))
    write_failed(launch, words.splitlines()[0], ("running", "failed") if by_force else ("running",))
    return Verdict(1, words)


def _failure(
    launch: Launch, hosts: Sequence[Host], course: Course, bad: Sequence[Ended | HostLost], status: Status | None
) -> str:
    where = f"the run failed at step {status.step}" if status else "the run failed before it owned its folder"
    own = f"\n{where}: {status.reason}" if status and status.state == "failed" else f"\n{where}"
    if not bad:
        return f"{course.ended_for or 'DeepSpeed or pdsh ended before the ranks'}{_said(course)}{own}"
    first = bad[0]
    named = re.search(r"\brank (\d+)\b", status.reason) if status and status.state == "failed" else None
    if named and isinstance(first, Ended) and first.code > 0 and not first.why:
        # Ranks leave in any order when one has failed; the run itself knows which one it was.
        first = next((one for one in bad if isinstance(one, Ended) and one.rank == int(named.group(1))), first)
    ranks = [first.rank] if isinstance(first, Ended) else ranks_of(hosts, first.label)
    said = _said(course)
    for rank in ranks:
        path = log_file(Path(launch.output), rank)
        lines = last_lines(path, launch.id)
        if lines:
            said = f"\nthe last lines of {path}:" + "".join(f"\n    {line}" for line in lines)
            break
    return f"{_event(first, ranks)}{said}{own}"


def ranks_of(hosts: Sequence[Host], label: str) -> list[int]:
    """The ranks of the host that pdsh writes as `label`, which leaves domains out."""
    ranks, start = list[int](), 0
    for host in hosts:
        if label in (host.name, host.name.split(".")[0]):
            ranks += range(start, start + host.slots)
        start += host.slots
    return ranks


def last_lines(path: Path, launch: str, count: int = LINES) -> list[str]:
    """The end of what a rank printed in this launch."""
    try:
        text = path.read_bytes()[-100_000:].decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.rpartition(f"---- launch {launch}")[2].splitlines()[1:][-count:]


def _said(course: Course) -> str:
    """What DeepSpeed, pdsh and shells said, where no rank could."""
    lines = course.said[-LINES:]
    return "\nlast words:" + "".join(f"\n    {line}" for line in lines) if lines else ""


def _event(event: Ended | HostLost, ranks: Sequence[int] = ()) -> str:
    if isinstance(event, HostLost):
        which = f" (ranks {', '.join(map(str, ranks))})" if ranks else ""
        return f"host {event.label}{which}: {event.how}"
    if event.why:
        return f"rank {event.rank} on {event.host} was ended: {event.why}"
    if event.code < 0:
        name = signal.Signals(-event.code).name if -event.code in set(signal.Signals) else "unknown"
        hint = f"; if nobody sent it, the kernel may have run out of memory: `dmesg | tail` on {event.host}"
        return f"rank {event.rank} on {event.host} was killed by signal {-event.code} ({name}){hint if event.code == -9 else ''}"
    return f"rank {event.rank} on {event.host} ended with code {event.code}"
