import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fw_train.data.shards import ShardError
from fw_train.data.table import BLOCK_ROWS, Table

ROW = np.dtype([("key", "S80"), ("size", "<u4")])


def make_table(path, samples):
    rows = np.zeros(samples, ROW)
    rows["key"] = [f"clip_{number}".encode() for number in range(samples)]
    rows["size"] = np.arange(samples)[::-1]
    rows.tofile(path)
    return Table(path, ROW, samples, "write it again"), rows


@pytest.mark.parametrize("samples", [1, 5, 6, 7, 20])
def test_rows_blocks_and_columns_are_those_of_the_file(tmp_path, monkeypatch, samples):
    monkeypatch.setattr("fw_train.data.table.BLOCK_ROWS", 6)
    table, rows = make_table(tmp_path / "a.bin", samples)
    assert len(table) == samples
    assert all(table[number].tobytes() == rows[number].tobytes() for number in range(samples))
    blocks = [(first, block.tobytes()) for first, block in table.blocks()]
    assert [first for first, _ in blocks] == list(range(0, samples, 6))
    assert b"".join(data for _, data in blocks) == rows.tobytes()
    assert np.array_equal(table.column("size"), rows["size"])
    assert np.array_equal(table.column("key"), rows["key"])


def test_looking_through_a_long_table_holds_one_block_of_it(tmp_path):
    table, rows = make_table(tmp_path / "a.bin", 10 * BLOCK_ROWS)
    tracemalloc.start()
    sizes = table.column("size")
    assert all(table[number]["size"] == sizes[number] for number in range(0, len(table), 1000))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(sizes, rows["size"])
    assert most < sizes.nbytes + 1.1 * BLOCK_ROWS * ROW.itemsize
    assert "a.bin" not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_missing_or_has_another_length_is_refused(tmp_path):
    with pytest.raises(ShardError, match=r"a\.bin is missing; write it again"):
        Table(tmp_path / "a.bin", ROW, 3, "write it again")
    make_table(tmp_path / "a.bin", 3)
    with pytest.raises(ShardError, match=r"a\.bin has 252 bytes; 4 samples need 336; write it again"):
        Table(tmp_path / "a.bin", ROW, 4, "write it again")


def test_a_file_that_is_cut_while_it_is_read_ends_with_a_message(tmp_path):
    table, _ = make_table(tmp_path / "a.bin", 3)
    os.truncate(tmp_path / "a.bin", 2 * ROW.itemsize + 5)
    assert table[1]["size"] == 1
    for read in (lambda: table[2], lambda: table.column("size")):
        with pytest.raises(ShardError, match=r"a\.bin was cut while it was open; write it again"):
            read()


def test_the_file_is_closed_with_its_table(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    table, _ = make_table(tmp_path / "a.bin", 3)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del table
    assert len(os.listdir("/proc/self/fd")) == before
