"""Hostfiles: `node1 slots=8`, one host a line. Names are checked before any program sees them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MAX_BYTES = 1 << 20
MAX_SLOTS = 64
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
NAME = re.compile(rf"{LABEL}(?:\.{LABEL})*")
SLOTS = re.compile(r"slots=([0-9]{1,4})")
EXAMPLE = "write one host a line, such as `node1 slots=8`"


class HostfileError(ValueError):
    """A hostfile that must not be used; nothing has been started."""


class Host(NamedTuple):
    name: str
    slots: int  # ranks there: one per GPU


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts in the order of the file, which is the order of ranks."""
    if not path.is_file():
        raise HostfileError(f"no hostfile {path}; {EXAMPLE}")
    if path.stat().st_size > MAX_BYTES:
        raise HostfileError(f"{path} has {path.stat().st_size} bytes, too many for a hostfile; {EXAMPLE}")
    hosts: list[Host] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where = f"{path}, line {number}"
        host = _host(text, where)
        same = host.name.lower()
        if same in lines:
            raise HostfileError(
                f"{where}: {host.name} is on line {lines[same]} already; name each host once, with all its slots"
            )
        lines[same] = number
        hosts.append(host)
    if not hosts:
        raise HostfileError(f"{path} names no host; {EXAMPLE}")
    return tuple(hosts)


def describe_shape(hosts: Sequence[Host]) -> str:
    """`8 hosts x 8 slots = 64 ranks`."""
    counts = sorted({host.slots for host in hosts})
    ranks = sum(host.slots for host in hosts)
    slots = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{len(hosts)} host{'s' * (len(hosts) > 1)} x {slots} slot{'s' * (counts[-1] > 1)} = {ranks} ranks"


def _host(text: str, where: str) -> Host:
    name, *rest = text.split()
    # What is not a name is shown as Python writes it: it may hold what a terminal would obey.
    if len(name) > 253 or not NAME.fullmatch(name):
        raise HostfileError(
            f"{where}: {name[:80]!r} is not a host name; names have letters, digits, hyphens and dots (RFC 1123), "
            f"and users, ports and keys stand in ~/.ssh/config"
        )
    slots = SLOTS.fullmatch(rest[0]) if len(rest) == 1 else None
    if slots is None:
        raise HostfileError(f"{where}: {' '.join(rest)[:80]!r} after {name}, expected slots=N alone; {EXAMPLE}")
    count = int(slots.group(1))
    if not 1 <= count <= MAX_SLOTS:
        raise HostfileError(f"{where}: {name} has slots={count}; give the number of its GPUs, 1 to {MAX_SLOTS}")
    return Host(name, count)
