"""Processes that must not outlive others, seen with real ones: the tether, the keeper of a rank, the sweep."""

import os
import signal
import subprocess
import sys
import time

import pytest
from hosts_rig import lives

from launch.launch_file import Launch, log_file, write_launch
from launch.messages import Ended, read
from launch.sweep import carrying

# What it starts leaves its session and its parent, as daemons do.
FAMILY = "setsid sleep 60 & (setsid sleep 60 &); sleep 0.3; echo started; "


def wait_until(condition, what, limit_s=10.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def family(mark):
    """Processes that carry the mark in their environment."""
    return [pid for pid, _ in carrying(mark) if lives(pid)]


@pytest.fixture
def mark():
    name = f"test{os.getpid()}x{time.monotonic_ns()}"
    yield name
    for pid in family(name):
        os.kill(pid, signal.SIGKILL)


def start_tether(mark, script):
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.tether", "bash", "-c", FAMILY + script],
        stdout=subprocess.PIPE, env={**os.environ, "FW_LAUNCH": mark},
    )  # fmt: skip
    assert process.stdout.readline() == b"started\n"
    return process


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("exit 0", 0)])
def test_a_tether_ends_with_its_command_and_leaves_nothing(mark, script, code):
    process = start_tether(mark, script)
    assert process.wait(10) == code
    assert family(mark) == []


def test_a_tether_that_is_told_to_end_takes_all_along(mark):
    process = start_tether(mark, "wait; sleep 60")
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    assert family(mark) == []


def test_a_tether_notices_the_death_of_its_parent(mark):
    line = [sys.executable, "-m", "launch.tether", "bash", "-c", FAMILY + "sleep 60"]
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({line!r})"],
        stdout=subprocess.PIPE, env={**os.environ, "FW_LAUNCH": mark},
    )  # fmt: skip
    assert parent.stdout.readline() == b"started\n"
    parent.kill()
    parent.wait()
    wait_until(lambda: family(mark) == [], "the tether outlives its parent")


class Keeper:
    """`launch.rank` with a program in place of the trainer, under a parent like DeepSpeed's launcher on a host."""

    def __init__(self, tmp_path, mark, trainer, rank=0):
        (tmp_path / "logs").mkdir()
        (tmp_path / "trainer.sh").write_text(trainer)
        write_launch(tmp_path / "launch.json", Launch(mark, ("$(touch CANARY)", "a b"), str(tmp_path), None))
        # Only the name of the program that the keeper starts is another one.
        code = (
            "import subprocess, sys; from launch import rank; real = subprocess.Popen\n"
            f"subprocess.Popen = lambda line, **k: real(['bash', {str(tmp_path / 'trainer.sh')!r}, *line[4:]], **k)\n"
            "sys.exit(rank.main(sys.argv[1:]))"
        )
        line = [sys.executable, "-c", code, str(tmp_path / "launch.json")]
        self.parent = subprocess.Popen(
            [sys.executable, "-c", f"import subprocess, sys; sys.exit(subprocess.run({line!r}).returncode)"],
            stdout=subprocess.PIPE, env={**os.environ, "FW_LAUNCH": mark, "RANK": str(rank)},
        )  # fmt: skip
        self.mark, self.log = mark, log_file(tmp_path, rank)

    def wait_for_start(self):
        wait_until(lambda: self.log.exists() and b"started" in self.log.read_bytes(), "no trainer")

    def messages(self):
        out = self.parent.communicate(timeout=15)[0].decode()
        return [read(self.mark, f"node1: {line}") for line in out.splitlines()]


def test_a_keeper_logs_its_rank_and_passes_rank_0_on(tmp_path, mark):
    keeper = Keeper(tmp_path, mark, 'printf "%s|" "$@"; echo; echo oops >&2; printf half; exit 4')
    *lines, end = keeper.messages()
    assert [line.text for line in lines] == ["$(touch CANARY)|a b|", "oops", "half"]
    assert end == Ended(0, os.uname().nodename, 4, "")
    assert keeper.parent.returncode == 4
    header, *logged = keeper.log.read_text().splitlines()
    assert header.startswith(f"---- launch {mark}")
    assert logged == ["$(touch CANARY)|a b|", "oops", "half"]


def test_other_ranks_only_log(tmp_path, mark):
    keeper = Keeper(tmp_path, mark, FAMILY + "kill -9 $$", rank=3)
    (end,) = keeper.messages()
    assert end == Ended(3, os.uname().nodename, -9, "")
    assert keeper.log.name == "rank-00003.log"
    assert "started" in keeper.log.read_text()
    assert family(mark) == []  # the killed rank's own children, too


def test_a_keeper_ends_its_rank_when_nobody_reads_any_more(tmp_path, mark):
    """What a keeper sees of a connection that has broken; its rank writes nothing, and would never notice."""
    keeper = Keeper(tmp_path, mark, FAMILY + "sleep 60", rank=1)
    keeper.wait_for_start()
    keeper.parent.stdout.close()
    wait_until(lambda: family(mark) == [], "the rank outlives the connection")


def test_a_keeper_ends_its_rank_when_the_launch_is_over(tmp_path, mark):
    keeper = Keeper(tmp_path, mark, FAMILY + "sleep 60", rank=1)
    keeper.wait_for_start()
    (tmp_path / "launch.json").unlink()
    *_, end = keeper.messages()
    assert end.why == "the launch is over"


def test_a_keeper_ends_its_rank_when_deepspeeds_launcher_is_killed(tmp_path, mark):
    keeper = Keeper(tmp_path, mark, FAMILY + "sleep 60", rank=1)
    keeper.wait_for_start()
    keeper.parent.kill()
    *_, end = keeper.messages()
    assert end == Ended(1, os.uname().nodename, -9, "DeepSpeed's launcher on this host has ended")
    wait_until(lambda: family(mark) == [], "the rank outlives its launcher")


def test_a_rank_dies_with_its_keeper_and_the_sweep_finds_what_it_started(tmp_path, mark):
    keeper = Keeper(tmp_path, mark, FAMILY + "sleep 60", rank=1)
    keeper.wait_for_start()
    (pid,) = (
        pid
        for pid, command in carrying(mark)
        if "from launch import rank" in command and "subprocess.run" not in command
    )
    os.kill(pid, signal.SIGKILL)
    keeper.parent.wait(10)
    wait_until(
        lambda: not any("trainer.sh" in command for _, command in carrying(mark)), "the rank outlives its keeper"
    )
    stranger = subprocess.Popen(["sleep", "60"], env={**os.environ, "FW_LAUNCH": f"{mark}x"})
    assert len(family(mark)) == 3
    done = subprocess.run([sys.executable, "-m", "launch.sweep", mark], capture_output=True, text=True, check=True)
    assert done.stdout.count("sleep 60") == 3
    wait_until(lambda: family(mark) == [], "the sweep left something")
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
