import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from fw_train.run.folder import RunFolder, Status, read_status
from fw_train.watch.watcher import FAILED, HUNG, Watch

SCRIPT = Path(__file__).with_name("watched.py")
WORLD, HANG_S, LIMIT_S = 3, 4.0, 60.0
MODES = ("sleep", "deadlock", "gil", "stopped", "killed", "raise", "both", "echo", "no one else", "late", "suspended",
         "full", "compile", "nothing")  # fmt: skip


class Job(NamedTuple):
    folder: RunFolder
    processes: list[subprocess.Popen]
    log: Path

    def end(self):
        """Exit codes, and what all ranks wrote into one log."""
        deadline = time.monotonic() + LIMIT_S
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        return codes, self.log.read_text()


def start(mode, folder):
    job = Job(RunFolder.claim(folder), [], folder.with_suffix(".log"))
    with job.log.open("ab") as log:
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        for rank in range(WORLD):
            command = [sys.executable, str(SCRIPT), mode, str(rank), str(WORLD), str(folder), str(HANG_S)]
            job.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environ))
    return job


def clear(job):
    for process in job.processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()
    job.folder.release()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All at once, for they mostly sleep."""
    started = {mode: start(mode, tmp_path_factory.mktemp("run") / mode.replace(" ", "_")) for mode in MODES}
    yield started
    for job in started.values():
        clear(job)


@pytest.mark.parametrize(
    ("mode", "culprit", "words"),
    [
        ("sleep", 2, ["rank 2 hung: nothing done for", "in loading_for_ever", "time.sleep(1000)"]),
        ("deadlock", 0, ["rank 0 hung: nothing done for", "in waiting_for_a_thread", "in decoding_thread"]),
        ("gil", 2, ["rank 2 does not answer for", "holds the GIL", "in holding_the_interpreter"]),
        ("stopped", 0, ["rank 0 does not answer for", "is stopped (SIGSTOP)", "most recent call last"]),
        ("killed", 2, ["rank 2 has ended without a word"]),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_stack_and_samples_and_all_end(jobs, mode, culprit, words):
    codes, log = jobs[mode].end()
    gone = {"gil": -signal.SIGKILL, "stopped": -signal.SIGKILL, "killed": -signal.SIGKILL}
    assert codes == [gone.get(mode, HUNG) if rank == culprit else HUNG for rank in range(WORLD)], log
    for word in [*words, f"phase forward, step 12, samples sample-{culprit}-12"]:
        assert word in log, log
    assert log.endswith(f"the run ends, with code {HUNG}\n"), log
    assert "is done" not in log
    status = read_status(jobs[mode].folder.path)
    assert status.state == "failed"
    assert status.reason.startswith(f"rank {culprit} ")


def test_the_error_of_one_rank_ends_all_and_its_traceback_comes_once_and_last(jobs):
    codes, log = jobs["raise"].end()
    assert codes == [FAILED] * WORLD, log
    assert log.count("Traceback") == 1, log
    assert log.endswith("ValueError: boom\n"), log
    assert "rank 1 failed in phase forward, step 12, samples sample-1-12" in log
    for rank in (0, 2):
        assert f"rank 1 failed: ValueError: boom; rank {rank} ends" in log
    assert read_status(jobs["raise"].folder.path) == Status("failed", 12, "rank 1 failed: ValueError: boom")


def test_of_errors_at_the_same_time_one_is_shown(jobs):
    codes, log = jobs["both"].end()
    assert codes == [FAILED] * WORLD, log
    assert log.count("Traceback") == 1, log
    assert log.splitlines()[-1].startswith("ValueError: boom of rank "), log


def test_an_error_that_follows_from_another_ranks_end_gives_way_to_it(jobs):
    codes, log = jobs["echo"].end()
    assert codes == [FAILED] * WORLD, log
    assert log.count("Traceback") == 1, log
    assert log.endswith("ValueError: boom\n"), log


def test_an_error_of_communication_without_another_behind_it_is_shown(jobs):
    codes, log = jobs["no one else"].end()
    assert codes == [FAILED] * WORLD, log
    assert log.endswith("ConnectionResetError: reset by peer\n"), log


@pytest.mark.parametrize("mode", ["late", "suspended", "full", "compile", "nothing"])
def test_ranks_that_get_on_are_left_alone(jobs, mode):
    """One that others wait for; all stopped together for a while; a full disk; a long first step."""
    codes, log = jobs[mode].end()
    assert codes == [0] * WORLD, log
    assert "hung" not in log
    assert "does not answer" not in log
    if mode != "full":
        assert log.count("is done") == WORLD


def test_the_next_start_knows_nothing_of_the_last_ones_failure(jobs):
    job = jobs["raise"]
    job.end()
    job.folder.release()
    for meeting in job.folder.path.glob("came-*"):
        meeting.unlink()
    again = start("nothing", job.folder.path)
    try:
        codes, log = again.end()
    finally:
        clear(again)
    assert codes == [0] * WORLD, log
    assert [path.name for path in (again.folder.path / ".watch").iterdir()] == [again.folder.token]


def test_whereabouts_of_a_slow_rank(tmp_path):
    folder = RunFolder.claim(tmp_path)
    watch = Watch(tmp_path, 0, 2, hang_s=60, first_step_s=60)
    watch.beat("data", 7, ["k"])
    watch.beat("forward")  # neither step nor samples are repeated
    watch.close()
    assert "phase forward, step 7, samples k" in watch.whereabouts(0)
    assert "in test_whereabouts_of_a_slow_rank" in watch.whereabouts(0)
    assert watch.whereabouts(1) == "rank 1 has given no sign of life yet"
    folder.release()
    with pytest.raises(ValueError, match="claim it before"):
        Watch(tmp_path / "new", 0, 1, hang_s=60, first_step_s=60)
