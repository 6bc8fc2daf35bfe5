import io
import os
import pty
import re

import pytest

from fw_train.monitoring.terminal import (
    BAR_CELLS,
    CLEAR_LINE,
    Line,
    Terminal,
    bar,
    duration,
    number,
    step_count,
    step_line,
)


def line(**changes):
    known = {
        "step": 1200,
        "total_steps": 20000,
        "loss": 0.83124,
        "terms": {"diffusion": 0.41, "depth": 0.2104},
        "learning_rate": 1e-5,
        "grad_norm": 0.83,
        "seconds_per_step": 2.3149,
        "samples_per_s": 27.66,
        "mfu_percent": 41.2,
        "data_wait_percent": 0.31,
        "peak_memory_gib": 61.24,
        "eta_s": 12 * 3600 + 4 * 60 + 11.2,
    }
    return Line(**{**known, **changes})


def test_a_logged_step_reads_as_one_line():
    assert step_line(line()) == (
        "step  1200/20000  loss 0.8312 (diffusion 0.410 depth 0.210)  lr 1.0e-05  grad 0.8300  2.315 s/step  "
        "27.66 samples/s  MFU 41 %  data  0.3 %  mem  61.2 GiB  eta  12:04:11"
    )


def test_what_is_not_known_is_left_out_or_a_dash_of_the_same_width():
    usual = step_line(line())
    early = step_line(line(loss=None, terms={"diffusion": None, "depth": None}, grad_norm=None, eta_s=None))
    assert "loss      - (diffusion     - depth     -)" in early
    assert early.endswith("eta         -")
    assert len(early) == len(usual)
    assert "MFU" not in step_line(line(mfu_percent=None))


def test_lines_keep_their_width_while_numbers_change():
    changes = (
        {"step": 9, "loss": 1234.5678, "grad_norm": 1e9, "eta_s": 3.0},
        {
            "step": 20000,
            "loss": float("nan"),
            "seconds_per_step": 123.4,
            "samples_per_s": 0.0123,
            "eta_s": 144 * 3600.0,
        },
        {"loss": -0.5, "terms": {"diffusion": 12.3, "depth": 0.0}, "data_wait_percent": 99.9, "peak_memory_gib": 7.0},
    )
    assert {len(step_line(line(**change))) for change in changes} == {len(step_line(line()))}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.83124, "0.8312"),
        (27.66, "27.660"),
        (99999.6, "100000"),
        (1e9, " 1e+09"),
        (-12.3456, "-12.35"),
        (float("-inf"), "  -inf"),
        (None, "     -"),
    ],
)
def test_numbers_show_as_many_digits_as_fit(value, text):
    assert number(value) == text


def test_durations_and_counts():
    assert [duration(s) for s in (0.4, 61, 3599.6, 100 * 3600)] == ["0:00:00", "0:01:01", "1:00:00", "100:00:00"]
    assert duration(None) == duration(float("inf")) == "-"
    assert step_count(7, 20000) == "step     7/20000"


def test_the_bar_fills_and_never_wraps():
    assert bar(0, 10, "", 80).count("#") == 0
    assert bar(5, 10, "", 80).count("#") == BAR_CELLS // 2
    assert bar(10, 10, "note", 80).startswith("[" + "#" * BAR_CELLS + "] 100.0 %  note")
    assert len(bar(5, 10, "a long note" * 9, 60)) == 59


def test_a_file_gets_plain_lines_only():
    stream = io.StringIO()
    terminal = Terminal(stream)
    terminal.progress(1, 4, "eta")
    terminal.line("first")
    terminal.progress(2, 4, "eta")
    terminal.line("second")
    terminal.close()
    assert stream.getvalue() == "first\nsecond\n"


def read_all(master, terminal_end, times):
    """What a terminal was shown, which arrives in pieces, until its last control sequence has come so many times."""
    seen = ""
    while seen.count(terminal_end) < times:
        seen += os.read(master, 10_000).decode()
    return seen


def test_a_terminal_shows_a_bar_below_the_lines_and_clears_it_in_the_end():
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        terminal = Terminal(stream)
        terminal.progress(1, 4, "eta 0:10")
        terminal.line("first")
        terminal.progress(2, 4, "eta 0:05")
        terminal.close()
        seen = read_all(master, terminal_end=CLEAR_LINE, times=4)
    os.close(master)
    bar_of = re.escape(CLEAR_LINE) + r"\[#*\.*\] +{} %  eta {}\r"
    want = bar_of.format("25.0", "0:10") + re.escape(CLEAR_LINE) + "first\r\n" + bar_of.format("50.0", "0:05")
    assert re.fullmatch(want + re.escape(CLEAR_LINE), seen)


def test_a_reader_that_has_gone_does_not_end_the_run():
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    Terminal(Broken()).line("nobody reads this")
