import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from fw_train.identity import this_process
from fw_train.run import folder as run_folder
from fw_train.run.folder import RunFolder, RunFolderBusy, Status, current_token, read_status, write_status

CLAIM = """
import sys, time
from pathlib import Path
from fw_train.run import folder as run_folder
folder, go, machine = map(str, sys.argv[1:])
if machine:
    here = run_folder.this_process()
    run_folder.this_process = lambda: here._replace(host=machine, machine=machine)
while go and not Path(go).exists():
    time.sleep(0.001)
try:
    run = run_folder.RunFolder.claim(Path(folder))
except run_folder.RunFolderBusy as busy:
    print("busy", busy, flush=True)
else:
    print("mine", run.token, flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def claimant(tmp_path):
    """Starts processes that claim tmp_path/run; each says `mine` or `busy`."""
    processes = []

    def start(go="", machine=""):
        command = [sys.executable, "-c", CLAIM, str(tmp_path / "run"), str(go), machine]
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ, text=True)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def answer(process):
    return process.stdout.readline().split(maxsplit=1)


def abandon(folder, **changes):
    """A lease as an owner leaves it that is killed."""
    run = RunFolder.claim(folder)
    run._done.set()
    run._renewer.join()
    file = folder / ".lease" / str(run._number)
    token, owner, since, renewals, released = json.loads(file.read_text())
    owner = list(this_process()._replace(**changes))
    file.write_text(json.dumps([token, owner, since, renewals, released]))
    return run


def test_a_second_start_is_refused_and_told_who_owns_the_folder(claimant, tmp_path):
    owner = claimant()
    assert answer(owner)[0] == "mine"
    with pytest.raises(RunFolderBusy, match=rf"in use by process {owner.pid} on .* since .*kill -TERM {owner.pid} on"):
        RunFolder.claim(tmp_path / "run")
    owner.send_signal(signal.SIGSTOP)  # it may go on at any time
    with pytest.raises(RunFolderBusy):
        RunFolder.claim(tmp_path / "run")


def test_a_killed_owner_gives_way_at_once(claimant, tmp_path, caplog):
    owner = claimant()
    _, token = answer(owner)
    owner.kill()  # not reaped: its number is still taken
    with caplog.at_level(logging.WARNING):
        run = RunFolder.claim(tmp_path / "run")
    assert "has ended; taking it over" in caplog.text
    assert run.still_mine()
    assert run.token != token.strip()
    run.release()


def test_a_process_number_that_was_given_to_another_does_not_count_as_the_owner(tmp_path):
    abandon(tmp_path, started=this_process().started - 1)
    RunFolder.claim(tmp_path).release()


def test_a_released_folder_is_free(tmp_path, caplog):
    first = RunFolder.claim(tmp_path)
    first.release()
    second = RunFolder.claim(tmp_path)
    assert not first.still_mine()
    assert second.still_mine()
    assert current_token(tmp_path) == second.token
    second.release()
    assert caplog.text == ""


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_newcomers_one_wins(claimant, tmp_path, stale):
    if stale:
        abandon(tmp_path / "run", pid=2**22 + 1)
    go = tmp_path / "go"
    newcomers = [claimant(go) for _ in range(6)]
    go.touch()
    answers = [answer(newcomer)[0] for newcomer in newcomers]
    assert sorted(answers) == ["busy"] * 5 + ["mine"]


def test_a_newcomer_that_was_overtaken_does_not_win(tmp_path, monkeypatch):
    owner = RunFolder.claim(tmp_path)
    look, stale = run_folder._last, [0]  # it saw no lease; then the owner was faster
    monkeypatch.setattr(run_folder, "_last", lambda path: stale.pop() if stale else look(path))
    with pytest.raises(RunFolderBusy):
        RunFolder.claim(tmp_path)
    assert owner.still_mine()
    owner.release()


def test_an_owner_on_another_machine_is_known_to_live_by_its_renewals(claimant, tmp_path):
    assert answer(claimant(machine="elsewhere"))[0] == "mine"
    with pytest.raises(RunFolderBusy, match="on elsewhere"):
        RunFolder.claim(tmp_path / "run")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stale_lease_of_another_machine_is_taken_over_and_its_owner_finds_out(tmp_path, monkeypatch, caplog, damaged):
    lost = abandon(tmp_path, host="elsewhere", machine="elsewhere")
    if damaged:
        (tmp_path / ".lease" / "1").write_bytes(b"")
    monkeypatch.setattr(run_folder, "STALE_S", 0.5)
    run = RunFolder.claim(tmp_path)
    assert "has not renewed its lease" in caplog.text
    lost._publish(released=False)  # it wakes up, and must neither win the folder back nor write there
    assert "must stop" in caplog.text
    assert not lost.still_mine()
    assert run.still_mine()
    run.status("running", 7, "")
    lost.status("failed", 3, "late")
    assert read_status(tmp_path) == Status("running", 7, "")
    run.release()


def test_the_same_host_name_on_another_machine_is_another_machine(tmp_path, monkeypatch):
    """Containers share host names and count processes from 1: a missing process there is not a dead owner."""
    abandon(tmp_path, pid=2**22 + 1, machine="another container")
    monkeypatch.setattr(run_folder, "STALE_S", 0.5)
    began = time.monotonic()
    RunFolder.claim(tmp_path).release()
    assert time.monotonic() - began >= 0.5  # watched, not looked up


def test_status_is_replaced_whole_and_a_full_disk_is_a_warning(tmp_path, monkeypatch, caplog):
    assert read_status(tmp_path) is None
    run = RunFolder.claim(tmp_path)
    run.status("stopped", 12, "SIGTERM")
    assert json.loads((tmp_path / "status.json").read_text()) == {"state": "stopped", "step": 12, "reason": "SIGTERM"}
    write_status(tmp_path, run.token, Status("failed", 13, "rank 1"))  # any rank that knows the token
    assert read_status(tmp_path) == Status("failed", 13, "rank 1")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        run.status("finished", 14, "")
    assert "No space left" in caplog.text
    assert read_status(tmp_path) == Status("failed", 13, "rank 1")
    run.release()
    (tmp_path / "status.json").write_text('{"state": "tired"}')
    with pytest.raises(ValueError, match="running, stopped, finished, failed"):
        read_status(tmp_path)
