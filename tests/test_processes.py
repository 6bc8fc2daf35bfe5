"""The helper for tests with several processes: nothing hangs, nothing is left, everything is shown."""

import os
import sys
import time
from pathlib import Path

import pytest

import processes
from processes import run_command, run_function


def fail_on(rank):
    print(f"I am {os.environ['RANK']}")
    if os.environ["RANK"] == str(rank):
        raise RuntimeError("no luck")
    time.sleep(60)


def test_a_failure_shows_every_rank_and_waits_for_none(monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    with pytest.raises(AssertionError) as caught:
        run_function(fail_on, 1, size=2, timeout_s=30)
    message = str(caught.value)
    for part in ("rank 0 was still running", "I am 0", "rank 1 ended with 1", "I am 1", "no luck"):
        assert part in message


def test_children_of_a_process_that_hangs_are_killed(tmp_path):
    script = "sleep 60 & echo $! > pid_$RANK; wait"
    outcomes = run_command(["bash", "-c", script], size=2, timeout_s=1, check=False, cwd=tmp_path)
    assert [o.timed_out for o in outcomes] == [True, True]
    for rank in range(2):
        status = Path("/proc") / (tmp_path / f"pid_{rank}").read_text().strip() / "status"
        for _ in range(100):
            if not status.exists() or "State:\tZ" in status.read_text():
                break
            time.sleep(0.02)
        else:
            raise AssertionError("a child survived")


def give_back(*args):
    return [*args, int(os.environ["RANK"])]


def test_results_come_by_rank():
    assert run_function(give_back, "a", {"b": 1}, size=3) == [["a", {"b": 1}, rank] for rank in range(3)]


def test_a_variable_can_be_removed():
    script = "import os; print('RANK' in os.environ, os.environ['NEW'])"
    assert run_command([sys.executable, "-c", script], size=1, env={"RANK": None, "NEW": "x"})[0].output == "False x\n"
