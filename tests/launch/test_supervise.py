"""The watch over a launch, on programs that say what pdsh would say; in a process of its own, for it ends all its descendants."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch.messages import Ended, ended, shown
from launch.sweep import carrying

ID = "ab12"
WATCH = """
import json, os, signal, sys
from pathlib import Path
from launch import supervise
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it
script, log, begun, stop_limit, grace = json.loads(sys.argv[1])
supervise.GRACE_S = supervise.LEAVE_S = grace
told = supervise.Told()
def ask_to_stop():
    print("asked", flush=True)
    return begun
course = supervise.supervise(["bash", "-c", script], os.environ, "ab12", 2, Path(log), told, ask_to_stop, stop_limit)
print(json.dumps([course.events, course.said, course.ended_for]))
"""


class Watch:
    """`supervise` over a shell script."""

    def __init__(self, tmp_path, script, *, begun=True, stop_limit=60.0, grace=60.0):
        self.mark, self.log = f"watch{time.monotonic_ns()}", tmp_path / "launcher.log"
        call = json.dumps([script, str(self.log), begun, stop_limit, grace])
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCH, call], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "FW_LAUNCH": self.mark},
        )  # fmt: skip

    def wait_for(self, line):
        assert self.process.stdout.readline().rstrip() == line

    def course(self):
        """What it saw, and what it showed; nothing of it is left."""
        limit = threading.Timer(20, self.process.kill)
        limit.start()
        *lines, last = self.process.stdout.read().splitlines()
        limit.cancel()
        assert self.process.wait(10) == 0
        assert carrying(self.mark) == []
        events, said, ended_for = json.loads(last)
        return [Ended(*event) if len(event) == 4 else tuple(event) for event in events], said, ended_for, lines


def end_of(rank, code):
    return f"echo 'node1: {ended(ID, Ended(rank, 'node1', code, '')).rstrip()}';"


def test_rank_0_is_shown_and_the_rest_is_logged(tmp_path):
    chatter = "echo 'node2: [INFO] chatter'; echo 'node2: trouble';"
    script = f"echo 'node1: {shown(ID, 'step 1').rstrip()}'; {chatter} {end_of(0, 0)}{end_of(1, 0)}"
    events, said, ended_for, lines = Watch(tmp_path, script).course()
    assert events == [Ended(0, "node1", 0, ""), Ended(1, "node1", 0, "")]
    assert (said, ended_for, lines) == (["node2: trouble"], "", ["step 1"])
    assert "chatter" in (tmp_path / "launcher.log").read_text()
    assert "step 1" not in (tmp_path / "launcher.log").read_text()


@pytest.mark.parametrize("code", [-9, 1, 0])
def test_the_first_end_takes_all_along(tmp_path, code):
    events, _, ended_for, _ = Watch(tmp_path, f"{end_of(1, code)} setsid sleep 60 & sleep 60", grace=0.3).course()
    assert events == [Ended(1, "node1", code, "")]
    assert ended_for.startswith("not all had ended 0.3 s after the first one")


def test_a_lost_host_is_not_waited_for(tmp_path):
    script = "echo 'pdsh@head: node2: ssh exited with exit code 255'; sleep 60"
    events, _, ended_for, _ = Watch(tmp_path, script).course()
    assert events == [("node2", "ssh exited with exit code 255")]
    assert "after a host was lost" in ended_for


def test_pdsh_may_die_and_leave_its_children(tmp_path):
    events, said, ended_for, _ = Watch(tmp_path, "setsid sleep 60 > /dev/null & echo last words; kill -9 $$").course()
    assert (events, said, ended_for) == ([], ["last words"], "")


def test_a_signal_asks_the_run_to_stop_and_waits_for_it(tmp_path):
    stop = tmp_path / "stop"
    watch = Watch(tmp_path, f"echo 'node1: @{ID} 0 up'; while [ ! -e {stop} ]; do sleep 0.1; done; {end_of(0, 0)}")
    watch.wait_for("up")
    watch.process.send_signal(signal.SIGTERM)
    watch.wait_for("asked")
    stop.touch()
    events, _, ended_for, lines = watch.course()
    assert events == [Ended(0, "node1", 0, "")]
    assert ended_for == ""
    assert lines == ["launch: SIGTERM: the run stops after its step, saved; once more ends it at once"]


def test_a_stop_has_its_limit(tmp_path):
    watch = Watch(tmp_path, f"echo 'node1: @{ID} 0 up'; sleep 60", stop_limit=0.3)
    watch.wait_for("up")
    watch.process.send_signal(signal.SIGINT)
    assert watch.course()[2] == "SIGINT, and it had not stopped after 0.3 s"


def test_a_second_signal_ends_it_at_once(tmp_path):
    watch = Watch(tmp_path, f"echo 'node1: @{ID} 0 up'; sleep 60")
    watch.wait_for("up")
    watch.process.send_signal(signal.SIGINT)
    watch.wait_for("asked")
    watch.process.send_signal(signal.SIGTERM)
    assert watch.course()[2] == "SIGTERM, the second signal"


def test_a_signal_before_the_run_has_begun_ends_it(tmp_path):
    watch = Watch(tmp_path, f"echo 'node1: @{ID} 0 up'; sleep 60", begun=False)
    watch.wait_for("up")
    watch.process.send_signal(signal.SIGHUP)
    assert watch.course()[2] == "SIGHUP before the run had begun"
