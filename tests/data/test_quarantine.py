from pathlib import Path

import pytest

from fw_train.data.quarantine import (
    QUARANTINE,
    WRITTEN,
    QuarantineEntry,
    lost_entries,
    read_quarantine,
    write_quarantine,
)
from fw_train.data.strict_json import SchemaError

ENTRIES = (
    QuarantineEntry("b", "pose inverted", "median error 3.1 %, inverted 0.02 %"),
    QuarantineEntry("a", "manual", "das Bild flimmert – schlecht"),
    QuarantineEntry("b", "frozen frames", "frames 3 to 9"),
)


def test_a_list_comes_back_sorted_by_key(tmp_path):
    write_quarantine(tmp_path, [*ENTRIES, ENTRIES[0]])
    assert read_quarantine(tmp_path) == (ENTRIES[1], ENTRIES[2], ENTRIES[0])
    assert {path.name for path in tmp_path.iterdir()} == {QUARANTINE, WRITTEN}
    assert "–" in (tmp_path / QUARANTINE).read_text(encoding="utf-8")  # legible to whoever edits it


def test_no_file_and_an_empty_one_hold_nothing(tmp_path):
    assert read_quarantine(tmp_path) == ()
    write_quarantine(tmp_path, ENTRIES)
    write_quarantine(tmp_path, [])
    assert (tmp_path / QUARANTINE).read_bytes() == b""
    assert read_quarantine(tmp_path) == ()


def test_lines_made_by_hand_are_read(tmp_path):
    text = '\n{"fault":"manual", "key":"clip-1"}\r\n\n  {"key": "a_B9", "fault": "manual", "detail": "blurred"}'
    (tmp_path / QUARANTINE).write_text(text)
    assert read_quarantine(tmp_path) == (
        QuarantineEntry("clip-1", "manual", ""),
        QuarantineEntry("a_B9", "manual", "blurred"),
    )


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("clip_1", "is not JSON"),
        ('{"key": "clip_1", "fault": "manual"', "is not JSON"),
        ('["clip_1", "manual"]', "an object is needed"),
        ('{"key": "clip_1"}', "no fault"),
        ('{"fault": "manual"}', "no key"),
        ('{"key": "clip_1", "fault": ""}', "and a fault"),
        ('{"key": 7, "fault": "manual"}', "key: a string is needed, not 7"),
        ('{"key": "../x", "fault": "manual"}', "letters, digits"),
        ('{"key": "a", "key": "b", "fault": "manual"}', "given twice"),
        ('{"key": "a", "fault": "manual", "reason": "x"}', "an unknown 'reason'"),
        ('{"key": "a", "fault": "\udcff"}', "is not JSON"),
    ],
)
def test_a_damaged_line_is_an_error_that_says_where(tmp_path, line, what):
    good = b'{"key": "a", "fault": "manual", "detail": ""}\n'
    (tmp_path / QUARANTINE).write_bytes(good + line.encode(errors="surrogateescape") + b"\n" + good)
    with pytest.raises(SchemaError, match=what) as error:
        read_quarantine(tmp_path)
    assert f"{QUARANTINE}, line 2" in str(error.value)


def test_lines_that_are_gone_since_the_list_was_written_are_known(tmp_path):
    assert lost_entries(tmp_path, None) == ()
    write_quarantine(tmp_path, ENTRIES)
    assert lost_entries(tmp_path, None) == ()
    path = tmp_path / QUARANTINE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]).replace("3 to 9", "3 to 7"))
    assert lost_entries(tmp_path, None) == (ENTRIES[0],)
    assert lost_entries(tmp_path, {"a"}) == ()
    path.unlink()
    assert len(lost_entries(tmp_path, None)) == 3


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_cannot_be_read_is_not_taken_for_no_list(tmp_path, make):
    make(tmp_path / QUARANTINE)
    with pytest.raises(SchemaError, match=r"quarantine\.jsonl cannot be read \(.*\); put the list back"):
        read_quarantine(tmp_path)
