"""Signs of life of a rank, and the judgement on who hangs; pure but for reading the state of processes."""

import json
import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple

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
        if before is None or heartbeat.place.beats != before.place.beats:
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
        code, line = frame.f_code, frame.f_lineno
        source = linecache.getline(code.co_filename, line).strip()
        calls.append(f"{code.co_filename}:{line} in {code.co_name}: {source}")
        frame = frame.f_back
    return tuple(reversed(calls))


def to_json(heartbeat: Heartbeat) -> bytes:
    return json.dumps(heartbeat).encode()


def from_json(data: bytes) -> Heartbeat:
    rank, process, number, place, stack, left = json.loads(data)
    phase, step, in_step, beats, keys, begun = place
    return Heartbeat(
        rank,
        process_from_json(process),
        number,
        Place(phase, step, in_step, beats, tuple(keys), begun),
        tuple(stack),
        left,
    )


def judge(
    seen: Mapping[int, Seen],
    now: float,
    hang_s: float,
    first_step_s: float,
    here: Process,
    dump_of: Callable[[int], str],
) -> Verdict | None:
    """Who hangs, if anybody does; `dump_of` reads the stacks that a rank wrote while its interpreter was blocked."""
    present = {rank: one for rank, one in seen.items() if one.heartbeat is None or not one.heartbeat.left}
    missing = [r for r, one in present.items() if one.heartbeat is None and now - one.alive_at > first_step_s]
    if missing:
        names = _names(missing)
        text = f"{names} never appeared in {first_step_s:.0f} s: not started, or the run's folder is not shared by all hosts"
        return Verdict(tuple(missing), text, text, ())
    beating = {rank: (one, one.heartbeat) for rank, one in present.items() if one.heartbeat is not None}
    silent = {rank: why for rank, (one, hb) in beating.items() if (why := _silence(one, hb, now, hang_s, here))}
    if silent:
        rows = [_row(rank, beating[rank][1], why, dump_of(rank)) for rank, why in silent.items()]
        first = next(iter(silent))
        return Verdict(
            tuple(silent),
            f"{_names(silent)} {silent[first]} ({_where(beating[first][1].place)})",
            "\n".join(rows),
            tuple(beating[rank][1].process for rank in silent),
        )
    still = {
        rank: now - one.moved_at
        for rank, (one, hb) in beating.items()
        if now - one.moved_at > (hang_s if hb.place.steps_begun >= 2 else first_step_s)
    }
    if not still:
        return None
    # All stand still when one does. Who waits for others is not to blame, nor is who has come further.
    suspects = {rank: hb for rank, (_, hb) in beating.items() if not hb.waits} or {
        r: hb for r, (_, hb) in beating.items()
    }
    least = min((hb.place.step, hb.place.in_step) for hb in suspects.values())
    culprits = {rank: hb for rank, hb in suspects.items() if (hb.place.step, hb.place.in_step) == least}
    if not culprits.keys() <= still.keys():
        return None  # the one that all wait for is slow, but it moves
    rows = [_row(r, hb, f"has done nothing for {still[r]:.0f} s", dump_of(r)) for r, hb in culprits.items()]
    others = [rank for rank in beating if rank not in culprits]
    if others:
        rows.append(f"the others: {'; '.join(_groups({r: beating[r][1] for r in others}))}")
    first, place = next((rank, hb.place) for rank, hb in culprits.items())
    headline = f"{_names(culprits)} hangs: nothing done for {still[first]:.0f} s ({_where(place)})"
    return Verdict(tuple(culprits), headline, "\n".join(rows), ())


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


def _row(rank: int, heartbeat: Heartbeat, what: str, dump: str) -> str:
    stack = dump.strip().splitlines() if dump.strip() else [*heartbeat.stack] or ["not known"]
    label = "its threads, most recent call first" if dump.strip() else "its stack, most recent call last"
    lines = [f"rank {rank} ({heartbeat.process}) {what}", f"  {_where(heartbeat.place)}", f"  {label}:"]
    return "\n".join(lines + [f"    {line}" for line in stack])


def _where(place: Place) -> str:
    keys = f", samples {', '.join(place.keys)}" if place.keys else ""
    return f"phase {place.phase}, {f'step {place.step}' if place.step >= 0 else 'before the first step'}{keys}"


def _groups(heartbeats: Mapping[int, Heartbeat]) -> list[str]:
    places: dict[str, list[int]] = {}
    for rank, heartbeat in heartbeats.items():
        call = heartbeat.stack[-1] if heartbeat.stack else "?"
        places.setdefault(f"{_where(heartbeat.place._replace(keys=()))}, {call}", []).append(rank)
    return [f"{_names(ranks)} in {place}" for place, ranks in places.items()]


def _names(ranks: Mapping[int, object] | list[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
