"""`metrics.jsonl`: what was measured, one strict JSON object a line, each with its `step` and `kind`."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fw_train.atomic_files import write_file

log = logging.getLogger(__name__)


def json_line(values: Mapping[str, Any]) -> str:
    """Strict JSON; numbers that it has no words for become "nan", "inf" and "-inf"."""
    return json.dumps(_strict(values), allow_nan=False)


def append_line(path: Path, line: str) -> None:
    """Adds a line, or nothing where the disk has no room for all of it."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        data = memoryview(line.encode() + b"\n")
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def drop_after(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Removes the lines of later steps, which will be done anew, and what a crash has left of a line; returns the others."""
    if not path.exists():
        return []
    kept, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        values = _parsed(line)
        broken += values is None
        if values is not None and values["step"] <= last_step:
            kept.append(values)
    if broken:
        log.warning("%s: %d broken lines of an interrupted run were removed", path, broken)
    write_file(path, "".join(json_line(values) + "\n" for values in kept).encode())
    return kept


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines in their order; what a killed run has left of one is passed over."""
    parsed = map(_parsed, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [values for values in parsed if values is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and isinstance(values.get("step"), int) else None


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
