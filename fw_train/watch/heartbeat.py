"""Signs of life of a rank, and the judgement on who hangs; pure but for reading the state of processes."""

import json
import linecache
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

from fw_train.identity import Process, process_from_json, state

GONE_S = 2.0  # a process of this machine that has ended without a word is named after so long
STACK_FRAMES = 25
WAITS_IN = ("torch/distributed/", "deepspeed/comm/")  # whoever is there waits for others


class Place(NamedTuple):
    """Where a rank's main thread is; (step, in_step) orders ranks that take the same steps."""

    phase: str = "start"
    step: int = -1
    in_step: int = 0  # beats since the step began
    beats: int = 0
    keys: tuple[str, ...] = ()
    steps_begun: int = 0  # from the second on, nothing is done for the first time


class Heartbeat(NamedTuple):
    rank: int
    process: Process
    number: int  # grows with each one written
    place: Place
    stack: tuple[str, ...]  # of the main thread, most recent call last
    left: str = ""  # how the rank has taken leave, if it has

    @property
    def waits(self) -> bool:
        """Whether the main thread waits in a collective."""
        return bool(self.stack) and any(folder in self.stack[-1] for folder in WAITS_IN)


class Trace(NamedTuple):
    """What a rank left behind outside its signs of life, which may be two seconds old when it falls silent."""

    place: Place | None
    dump: str  # the main thread's stack, written while the interpreter was blocked


@dataclass
class Seen:
    """What an observer knows of a rank, in seconds of the observer's own clock."""

    alive_at: float  # its number changed
    moved_at: float  # its main thread did something
    heartbeat: Heartbeat | None = None
    gone_at: float | None = None

    def update(self, heartbeat: Heartbeat, now: float) -> None:
        before = self.heartbeat
        if before is None or heartbeat.number != before.number:
            self.alive_at = now
        if before is None or (heartbeat.place.beats, heartbeat.left) != (before.place.beats, before.left):
            self.moved_at = now
        self.heartbeat = heartbeat

    def shift(self, seconds: float) -> None:
        """Leaves out a time in which the observer could not look."""
        self.alive_at += seconds
        self.moved_at += seconds


class Verdict(NamedTuple):
    ranks: tuple[int, ...]
    headline: str  # a line for all
    report: str  # who, where, samples and stack of each
    silent: tuple[Process, ...]  # those that cannot leave by themselves


def stack_of(frame: FrameType | None) -> tuple[str, ...]:
    """The calls of a thread, most recent last, each with its line of source."""
    calls: list[str] = []
    while frame is not None and len(calls) < STACK_FRAMES:
        code = frame.f_code
        line = frame.f_lineno or code.co_firstlineno  # another thread's may have none between two lines
        source = linecache.getline(code.co_filename, line).strip()
        calls.append(f"{code.co_filename}:{line} in {code.co_name}: {source}")
        frame = frame.f_back
    return tuple(reversed(calls))


def to_json(heartbeat: Heartbeat) -> bytes:
    return json.dumps(heartbeat).encode()


def place_to_json(place: Place) -> bytes:
    """A line, so that what is left of a longer one behind it does no harm."""
    return json.dumps(place).encode() + b"\n"


def place_from_json(data: bytes) -> Place:
    return _place(json.loads(data.partition(b"\n")[0]))


def from_json(data: bytes) -> Heartbeat:
    rank, process, number, place, stack, left = json.loads(data)
    return Heartbeat(rank, process_from_json(process), number, _place(place), tuple(stack), left)


def judge_silence(
    seen: Mapping[int, Seen],
    now: float,
    hang_s: float,
    first_step_s: float,
    here: Process,
    trace_of: Callable[[int], Trace],
) -> Verdict | None:
    """Who gives no sign of life, if anybody."""
    missing = [rank for rank, one in seen.items() if one.heartbeat is None and now - one.alive_at > first_step_s]
    if missing:
        names = _names(missing)
        text = f"{names} never appeared in {first_step_s:.0f} s: not started, or the run's folder is not shared by all hosts"
        return Verdict(tuple(missing), text, text, ())
    silent = {
        rank: (one.heartbeat, why)
        for rank, one in seen.items()
        if one.heartbeat is not None
        and not one.heartbeat.left
        and (why := _silence(one, one.heartbeat, now, hang_s, here))
    }
    if not silent:
        return None
    traces = {rank: trace_of(rank) for rank in silent}
    last = {
        rank: heartbeat._replace(place=traces[rank].place or heartbeat.place) for rank, (heartbeat, _) in silent.items()
    }
    first = min(silent)
    return Verdict(
        tuple(silent),
        f"{_names(silent)} {silent[first][1]} ({where(last[first].place)})",
        "\n".join(describe(heartbeat, silent[rank][1], traces[rank].dump) for rank, heartbeat in last.items()),
        tuple(heartbeat.process for heartbeat in last.values()),
    )


def judge_standstill(
    seen: Mapping[int, Seen], now: float, hang_s: float, first_step_s: float, settle_s: float
) -> Verdict | None:
    """Whom all others wait for, if nobody gets on; needs all ranks, for those that wait stand still as well.

    Once a slow rank has come, those that waited for it look late until their next sign of life: that may take `settle_s`.
    """
    beating = {
        rank: one.heartbeat for rank, one in seen.items() if one.heartbeat is not None and not one.heartbeat.left
    }
    idle = {rank: now - seen[rank].moved_at for rank in beating}
    still = {r for r, hb in beating.items() if idle[r] > (hang_s if hb.place.steps_begun >= 2 else first_step_s)}
    if not still or now - max(one.moved_at for one in seen.values()) < settle_s:
        return None
    # Who waits in a collective is not to blame, nor is who has come further.
    suspects = {rank: hb for rank, hb in beating.items() if not hb.waits} or beating
    least = min((hb.place.step, hb.place.in_step) for hb in suspects.values())
    culprits = {rank: hb for rank, hb in suspects.items() if (hb.place.step, hb.place.in_step) == least}
    if not culprits.keys() <= still:
        return None  # the one that all wait for is slow, but it moves
    rows = [describe(hb, f"has done nothing for {idle[rank]:.0f} s") for rank, hb in culprits.items()]
    others = {rank: hb for rank, hb in beating.items() if rank not in culprits}
    rows += [f"the others: {'; '.join(_groups(others))}"] * bool(others)
    first = min(culprits)
    headline = f"{_names(culprits)} hung: nothing done for {idle[first]:.0f} s ({where(culprits[first].place)})"
    return Verdict(tuple(culprits), headline, "\n".join(rows), ())


def describe(heartbeat: Heartbeat, what: str, dump: str = "") -> str:
    """Who a rank is, what is with it, where it is and what it calls."""
    stack = dump.strip().splitlines() or heartbeat.stack or ("not known",)
    label = (
        "its main thread, most recent call first"
        if dump.strip()
        else "its stack at the last sign of life, most recent call last"
    )
    lines = [f"rank {heartbeat.rank} ({heartbeat.process}) {what}", f"  {where(heartbeat.place)}", f"  {label}:"]
    return "\n".join(lines + [f"    {line}" for line in stack])


def where(place: Place) -> str:
    keys = f", samples {', '.join(place.keys)}" if place.keys else ""
    return f"phase {place.phase}, {f'step {place.step}' if place.step >= 0 else 'before the first step'}{keys}"


def _place(fields: Any) -> Place:
    phase, step, in_step, beats, keys, begun = fields
    return Place(phase, step, in_step, beats, tuple(keys), begun)


def _silence(one: Seen, heartbeat: Heartbeat, now: float, hang_s: float, here: Process) -> str:
    """Why a rank gives no sign of life; empty while it does."""
    letter = state(heartbeat.process, here)
    if letter != "gone":
        one.gone_at = None
    elif one.gone_at is None:
        one.gone_at = now
    if letter == "gone" and one.gone_at is not None and now - one.gone_at > GONE_S:
        return "has ended without a word: killed, perhaps for lack of memory (dmesg tells)"
    if now - one.alive_at <= hang_s:
        return ""
    reasons = {
        None: "stopped, swapped out, or its host is gone",
        "gone": "it has ended",
        "T": "it is stopped (SIGSTOP)",
        "t": "a debugger holds it",
        "D": "it waits in the kernel for a disk or a file server",
    }
    why = reasons.get(letter, "it lives, but its interpreter is blocked by C code that holds the GIL")
    return f"does not answer for {now - one.alive_at:.0f} s: {why}"


def _groups(heartbeats: Mapping[int, Heartbeat]) -> list[str]:
    places: dict[str, list[int]] = {}
    for rank, heartbeat in heartbeats.items():
        call = heartbeat.stack[-1] if heartbeat.stack else "?"
        places.setdefault(f"{where(heartbeat.place._replace(keys=()))}, {call}", []).append(rank)
    return [f"{_names(ranks)} in {place}" for place, ranks in places.items()]


def _names(ranks: Collection[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
