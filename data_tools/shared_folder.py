"""Folders that several commands or tasks may write to at once."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fw_train.atomic_files import ConcurrentWriter, clear_partial

ATTEMPTS = 10
PAUSE_S = 0.1


@contextmanager
def only_writer(folder: Path, refusal: str) -> Iterator[None]:
    """Holds the folder: nobody else writes to it meanwhile, and a killed process lets go of it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(refusal) from None
        yield
    finally:
        os.close(descriptor)


def write_last(folder: Path, write: Callable[[], None]) -> None:
    """Writes what joins the parts and clears away; tasks that end together may do so at once, with the same bytes."""
    for attempt in range(ATTEMPTS):
        try:
            write()
            break
        except (ConcurrentWriter, FileNotFoundError):  # another task replaced the file, or cleared its part of it away
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE_S)
    clear_partial(folder, "*")
