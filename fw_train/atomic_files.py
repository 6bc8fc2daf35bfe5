"""Files that are complete or absent, whatever kills the writer: staged beside their place, synced, renamed."""

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PARTIAL = ".tmp"  # `.<name>.<random>.tmp` beside the file while it is written


class ConcurrentWriter(OSError):
    """Somebody else writes the same file."""


@contextmanager
def new_file(path: Path, *, sync_name: bool = True) -> Iterator[IO[bytes]]:
    """A file that takes its name once it is complete and on disk; leftovers of killed writers of this name go.

    `sync_name`: wait for the name as well; not where somebody else does, who may have moved the folder by then.
    """
    clear_partial(path.parent, glob.escape(path.name))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    with open(partial, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    if sync_name:
        sync(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file in one step, unless it holds these bytes already."""
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    with new_file(path) as file:
        file.write(data)


def replace_file(path: Path, data: bytes) -> None:
    """A file that others see whole, old or new, and that a power cut may lose: for what is written every few seconds."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    partial.write_bytes(data)
    os.rename(partial, path)


def clear_partial(folder: Path, name: str) -> None:
    """Removes what killed writers of the files that `name`, a glob pattern, matches have left in a folder."""
    for leftover in folder.glob(f".{name}.????????{PARTIAL}"):
        leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(partial: Path, path: Path) -> None:
    try:
        os.rename(partial, path)
    except FileNotFoundError:
        raise ConcurrentWriter(f"{partial} went while it was written; another process is writing {path}") from None
