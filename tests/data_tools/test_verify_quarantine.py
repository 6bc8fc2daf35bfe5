"""A list of samples to leave out that was changed by accident is not in order; one that people edited is."""

import shutil

import pytest
from data_commands import command
from raw_clips import make_raw, write_metadata

from data_tools import pack, verify
from fw_train.data.quarantine import QUARANTINE, WRITTEN, QuarantineEntry, write_quarantine

ENTRIES = (
    QuarantineEntry("clip_0", "pose-inverted", "the error falls from 30 % to 0.02 %"),
    QuarantineEntry("clip_2", "manual", "a watermark"),
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    write_metadata(folder / "raw", make_raw(folder / "raw", clips=3))
    assert command(pack, folder / "raw", folder / "out", "--shard-size", 2, "--workers", 1) == 0
    write_quarantine(folder / "out", ENTRIES)
    return folder / "out"


@pytest.fixture
def out(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "out")


def problems(out):
    """The same whether every byte is read or not."""
    found = verify.verify(out, fast=True).problems
    assert verify.verify(out).problems == found
    return [str(problem) for problem in found]


def gone(entry):
    return (
        f"{QUARANTINE}: {entry.key}: its line for {entry.fault} is gone; copy it back from {WRITTEN}, or take it out there too if "
        "that is meant"
    )


def test_samples_in_quarantine_are_counted(out, capsys):
    assert command(verify, out, "--workers", 1) == 0
    assert "3 samples in 2 shards, 2 of them in quarantine; everything is in order" in capsys.readouterr().out


def test_a_list_that_was_deleted_or_emptied_is_named(out, capsys):
    (out / QUARANTINE).write_bytes(b"")
    assert problems(out) == [gone(entry) for entry in ENTRIES]
    (out / QUARANTINE).unlink()
    assert problems(out) == [gone(entry) for entry in ENTRIES]
    assert command(verify, out, "--workers", 1) == 1
    assert "2 problems in 1 files" in capsys.readouterr().out


def test_a_list_cut_at_any_byte_is_named(out):
    whole = (out / QUARANTINE).read_bytes()
    for length in range(len(whole) - 1):  # without the last line's end it is still whole
        (out / QUARANTINE).write_bytes(whole[:length])
        found = verify.verify(out, fast=True).problems
        assert {problem.file for problem in found} == {QUARANTINE}, length


def test_garbage_is_named_with_its_line(out):
    with open(out / QUARANTINE, "ab") as file:
        file.write(bytes(40) + b"\n")
    (found,) = problems(out)
    assert found.startswith(f"{QUARANTINE}: ")
    assert f"{QUARANTINE}, line 3 is not JSON" in found


def test_a_changed_key_is_named(out):
    path = out / QUARANTINE
    path.write_text(path.read_text().replace("clip_2", "clip_9"))
    assert problems(out) == [
        gone(ENTRIES[1]),
        f"{QUARANTINE}: clip_9: the dataset has no such sample; correct the key, or take the line out",
    ]
    path.write_text(path.read_text().replace("clip_9", "clip_1"))
    assert problems(out) == [gone(ENTRIES[1])]


def test_lines_may_be_added_and_reworded_by_hand(out):
    lines = (out / QUARANTINE).read_text().replace("a watermark", "two watermarks").splitlines()
    lines = ['{"key": "clip_1", "fault": "manual"}', "", *reversed(lines)]
    (out / QUARANTINE).write_text("\n".join(lines))
    assert problems(out) == []
    assert verify.verify(out, fast=True).quarantined == 3


def test_a_line_is_taken_out_of_both_files(out):
    for name in (QUARANTINE, WRITTEN):
        (out / name).write_text((out / name).read_text().splitlines()[1])
    assert problems(out) == []
    for name in (QUARANTINE, WRITTEN):
        (out / name).unlink()
    assert problems(out) == []


def test_a_list_made_by_hand_needs_no_copy(out):
    (out / WRITTEN).unlink()
    assert problems(out) == []


def test_a_damaged_copy_is_named(out):
    (out / WRITTEN).write_bytes((out / WRITTEN).read_bytes()[:20])
    (found,) = problems(out)
    assert f"{WRITTEN}, line 1 is not JSON" in found


def test_without_all_indexes_keys_are_not_judged(out):
    (out / "shard-000001.index.jsonl").unlink()
    (out / QUARANTINE).write_text((out / QUARANTINE).read_text() + '{"key": "clip_9", "fault": "manual"}\n')
    assert not [problem for problem in verify.verify(out, fast=True).problems if problem.file == QUARANTINE]
