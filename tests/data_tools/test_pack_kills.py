"""Runs of `fw data pack` that are killed, or end together, leave what one undisturbed run leaves."""

import argparse
import os
import time

from killed_packing import exit_code, kill_often
from raw_clips import contents, make_raw

from data_tools import pack


def packing_child(raw, out, *words):
    """A fork of this process that packs; its number."""
    child = os.fork()
    if child == 0:
        try:
            parser = argparse.ArgumentParser()
            pack.add_arguments(parser)
            os._exit(pack.run(parser.parse_args([str(raw), str(out), "--workers", "1", *words])))
        finally:
            os._exit(99)
    return child


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    raw, out, whole = tmp_path / "raw", tmp_path / "out", tmp_path / "whole"
    make_raw(raw, clips=6)

    def start(folder):
        return packing_child(raw, folder, "--shard-size", "1")

    begin = time.monotonic()
    assert exit_code(start(whole)) == 0
    left = kill_often(start, out, shards=6, shard_s=(time.monotonic() - begin) / 6, kills=6)
    assert len(left) == 6
    assert any(0 < finished < 6 for finished in left), left
    assert exit_code(start(out)) == 0
    assert contents(out) == contents(whole)


def test_tasks_that_end_together_all_write_the_manifest(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    make_raw(raw, clips=2)
    assert exit_code(packing_child(raw, out)) == 0
    whole = contents(out)
    for _ in range(5):
        for name in ("manifest.jsonl", "samples.bin", "rejects.jsonl"):
            (out / name).unlink()
        children = [packing_child(raw, out, "--manifest-only") for _ in range(4)]
        assert [exit_code(child) for child in children] == [0] * 4
        assert contents(out) == whole
