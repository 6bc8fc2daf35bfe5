"""Samples that are not trained on: `quarantine.jsonl` in a packed dataset, a line for each fault of a sample.

    {"key": "clip_0007", "fault": "manual", "detail": "a watermark over half of the picture"}

`fw data audit` writes it and people may edit it, so it has no seal; its order and empty lines mean nothing. What it held when it
was last written stands in `audit.quarantine.jsonl` too, which nothing is left out by: whoever loses lines learns of it.
"""

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from fw_train.atomic_files import write_file
from fw_train.data.schema import KEY, KEY_LENGTH
from fw_train.data.strict_json import SchemaError, read_json, read_record

QUARANTINE, WRITTEN = "quarantine.jsonl", "audit.quarantine.jsonl"


class QuarantineEntry(NamedTuple):
    """Why a sample is left out; a sample may have several."""

    key: str
    fault: str
    detail: str


@dataclass(frozen=True)
class _Line:
    key: str
    fault: str
    detail: str = ""


def read_quarantine(folder: Path, name: str = QUARANTINE) -> tuple[QuarantineEntry, ...]:
    """The entries of a dataset, none where it has no list; keys that the dataset does not have are the caller's to judge."""
    path = folder / name
    if not os.path.lexists(path):  # where a link leads nowhere, there was a list
        return ()
    try:
        lines = enumerate(path.read_bytes().splitlines(), start=1)
    except OSError as error:
        raise SchemaError(
            f"{path} cannot be read ({error.strerror}); put the list back, or remove it to leave nothing out"
        ) from None
    return tuple(_entry(line, f"{path}, line {number}") for number, line in lines if line.strip())


def write_quarantine(folder: Path, entries: Iterable[QuarantineEntry]) -> None:
    """Replaces the list in one step, sorted by key and without repetitions, and then what is known to have been written."""
    lines = [asdict(_Line(*entry)) for entry in sorted(set(entries))]
    data = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode()
    for name in (QUARANTINE, WRITTEN):
        write_file(folder / name, data)


def lost_entries(folder: Path, keys: Collection[str] | None) -> tuple[QuarantineEntry, ...]:
    """What the list held of these keys (None: of all) when it was last written, and does not hold now; details may change."""
    now = {(entry.key, entry.fault) for entry in read_quarantine(folder)}
    return tuple(
        entry
        for entry in read_quarantine(folder, WRITTEN)
        if (entry.key, entry.fault) not in now and (keys is None or entry.key in keys)
    )


def _entry(line: bytes, where: str) -> QuarantineEntry:
    read = read_record(_Line, read_json(line, where), where)
    if not KEY.fullmatch(read.key) or not read.fault:
        raise SchemaError(
            f"{where}: key {read.key!r:.100}, fault {read.fault!r:.40}; a line names a sample by 1 to {KEY_LENGTH} letters, "
            'digits, - and _, and a fault, as "manual"'
        )
    return QuarantineEntry(read.key, read.fault, read.detail)
