"""What a rank's keeper tells the launcher through pdsh: marked lines among everything that programs on the hosts print."""

import json
import re
from typing import NamedTuple

MAX_TEXT = 2000  # pdsh cuts lines into pieces; the log holds all
PDSH_SAYS = re.compile(r"pdsh@[^:]*: ([^:]+): (.*)")
LABEL = re.compile(r"([^:\s]+): ?(.*)", re.DOTALL)


class Shown(NamedTuple):
    """A line of rank 0."""

    text: str


class Ended(NamedTuple):
    """How a rank ended."""

    rank: int
    host: str
    code: int  # negative: the signal that ended it
    why: str  # what ended it from outside; empty: it ended by itself


class HostLost(NamedTuple):
    """The connection to a host has ended badly; `label` is its name as pdsh writes it, without its domain."""

    label: str
    how: str

    @property
    def broken(self) -> bool:
        """Whether the connection itself ended, and not what it carried."""
        return self.how.endswith("exit code 255") or "signal" in self.how


class Other(NamedTuple):
    """What another program on a host, or pdsh or DeepSpeed here, says."""

    line: str


def shown(launch: str, text: str) -> str:
    return f"@{launch} 0 {text[:MAX_TEXT]}\n"


def ended(launch: str, end: Ended) -> str:
    return f"@{launch} E {json.dumps(end)}\n"


def read(launch: str, line: str) -> Shown | Ended | HostLost | Other:
    """One line as pdsh prints it."""
    line = line.rstrip("\n")
    labelled = LABEL.fullmatch(line)
    mark = f"@{launch} "
    if labelled and labelled.group(2).startswith(mark):
        kind, _, rest = labelled.group(2)[len(mark) :].partition(" ")
        if kind == "0":
            return Shown(rest)
        if kind == "E":
            rank, host, code, why = json.loads(rest)
            return Ended(rank, host, code, why)
    said = PDSH_SAYS.fullmatch(line)
    if said:
        return HostLost(said.group(1), said.group(2))
    return Other(line)
