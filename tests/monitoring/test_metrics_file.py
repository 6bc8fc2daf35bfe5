import json
import math

import pytest

from fw_train.monitoring.metrics_file import append_line, drop_after, json_line


def test_numbers_that_json_has_no_words_for_become_text():
    line = json_line({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 0.5, "e": True, "f": None})
    assert line == '{"a": "nan", "b": ["inf", {"c": "-inf"}], "d": 0.5, "e": true, "f": null}'


def test_later_lines_and_torn_ones_go_and_the_others_stay_as_they_are(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    assert drop_after(path, 5) == []
    for step in (1, 5, 6, 7, 3):
        append_line(path, json_line({"kind": "step", "step": step, "loss": step / 3, "text": "é\n"}))
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= 5]
    for torn in ('{"kind": "step", "step": 8, "lo', '"step"', '{"kind": "step"}', "\x00\x00\x00"):
        whole = path.read_text()
        path.write_text(whole + torn)
        caplog.clear()
        assert [values["step"] for values in drop_after(path, 5)] == [1, 5, 3]
        assert path.read_text() == "".join(line + "\n" for line in kept)
        assert "1 broken lines" in caplog.text
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_a_crash_ended_before_its_line_break_is_kept_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    drop_after(path, 2)
    append_line(path, '{"step": 3}')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_an_error_names_the_file(tmp_path):
    with pytest.raises(OSError, match="metrics.jsonl"):
        append_line(tmp_path / "gone" / "metrics.jsonl", "{}")
