"""A file of fixed-size rows, read where it is asked and never mapped: a process holds no row that it is not working with.

Of a mapped file every page that was ever touched counts as memory of the process, and one that is cut ends it without a word.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fw_train.data.shards import ShardError

BLOCK_ROWS = 1 << 14


class Table:
    """Random access by row; may be used from several processes, and is open as long as it lives."""

    def __init__(self, path: Path, row: np.dtype[np.void], samples: int, remedy: str) -> None:
        self._path, self._row, self._samples, self._remedy = path, row, samples, remedy
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ShardError(f"{path} is missing; {remedy}") from None
        found, needed = os.fstat(self._descriptor).st_size, samples * row.itemsize
        if found != needed:
            raise ShardError(f"{path} has {found} bytes; {samples} samples need {needed}; {remedy}")

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, number: int) -> np.void:
        rows: NDArray[np.void] = np.empty(1, self._row)
        self._fill(rows, number)
        return rows[0]

    def blocks(self) -> Iterator[tuple[int, NDArray[np.void]]]:
        """All rows, some thousands at a time behind the number of their first; they are overwritten by the next ones."""
        rows: NDArray[np.void] = np.empty(min(BLOCK_ROWS, self._samples), self._row)
        for first in range(0, self._samples, BLOCK_ROWS):
            block = rows[: self._samples - first]
            self._fill(block, first)
            yield first, block

    def column(self, name: str) -> NDArray[Any]:
        """One field of all rows."""
        values: NDArray[Any] = np.empty(self._samples, self._row[name])
        for first, rows in self.blocks():
            values[first : first + len(rows)] = rows[name]
        return values

    def _fill(self, rows: NDArray[np.void], first: int) -> None:
        if os.preadv(self._descriptor, [rows.view(np.uint8).data], first * self._row.itemsize) < rows.nbytes:
            raise ShardError(f"{self._path} was cut while it was open; {self._remedy}")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
