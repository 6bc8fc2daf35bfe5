"""Samples that are not trained on: `quarantine.jsonl` in a packed dataset, a line for each fault of a sample.

    {"key": "clip_0007", "fault": "manual", "detail": "a watermark over half of the picture"}

`fw data audit` writes it and people may edit it, so it has no seal; its order and empty lines mean nothing.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from fw_train.atomic_files import write_file
from fw_train.data.schema import KEY, KEY_LENGTH
from fw_train.data.strict_json import SchemaError, read_json, read_record

QUARANTINE = "quarantine.jsonl"


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


def read_quarantine(folder: Path) -> tuple[QuarantineEntry, ...]:
    """The entries of a dataset, none where it has no list; keys that the dataset does not have are the caller's to judge."""
    path = folder / QUARANTINE
    if not path.is_file():
        return ()
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    return tuple(_entry(line, f"{path}, line {number}") for number, line in lines if line.strip())


def write_quarantine(folder: Path, entries: Iterable[QuarantineEntry]) -> None:
    """Replaces the list in one step, sorted by key and without repetitions."""
    lines = [asdict(_Line(*entry)) for entry in sorted(set(entries))]
    write_file(folder / QUARANTINE, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())


def _entry(line: bytes, where: str) -> QuarantineEntry:
    read = read_record(_Line, read_json(line, where), where)
    if not KEY.fullmatch(read.key) or not read.fault:
        raise SchemaError(
            f"{where}: key {read.key!r:.100}, fault {read.fault!r:.40}; a line names a sample by 1 to {KEY_LENGTH} letters, "
            'digits, - and _, and a fault, as "manual"'
        )
    return QuarantineEntry(read.key, read.fault, read.detail)
