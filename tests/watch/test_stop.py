import os
import signal
import subprocess
import sys
import time

import pytest

from fw_train.watch import stop as stop_module
from fw_train.watch.stop import StopRequest, asked_by

PHASES = """
import os, signal, sys, time
from fw_train.watch.stop import StopRequest
assert "torch" not in sys.modules
phase = sys.argv[1]
with StopRequest() as stop:
    print("ready", flush=True)
    if phase == "imports":
        import json, decimal, email.message
        while not stop.requested:
            pass
    elif phase == "C code":
        time.sleep(1)  # goes on after the signal
    elif phase == "children":
        child = os.fork()
        if child == 0:
            print("child", os.getpid(), flush=True)
            time.sleep(2)
            os._exit(7)
        _, status = os.waitpid(child, 0)
        print("child ended with", os.waitstatus_to_exitcode(status), flush=True)
    print("stops for", stop.reason if stop.requested else "nothing", flush=True)
"""


def child(phase):
    process = subprocess.Popen(
        [sys.executable, "-c", PHASES, phase],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("phase", ["imports", "C code"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_asks_and_does_not_kill(phase, number):
    process = child(phase)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert out == f"stops for {number.name}\n"
    assert process.returncode == 0


def test_the_second_interrupt_kills():
    process = child("C code")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(30) == -signal.SIGINT


def test_forked_workers_outlive_signals_that_schedulers_send_to_all():
    process = child("children")
    worker = int(process.stdout.readline().split()[1])
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
        os.kill(worker, number)
        time.sleep(0.1)  # two at once are one
    out, _ = process.communicate(timeout=30)
    assert out == "child ended with 7\nstops for nothing\n"


def test_the_first_reason_stays_and_the_old_handlers_return():
    old = [signal.getsignal(number) for number in stop_module.SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.reason == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.reason == "SIGUSR1"
    assert [signal.getsignal(number) for number in stop_module.SIGNALS] == old


def test_a_file_asks_too_and_goes_once_it_is_heeded(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_module, "LOOK_S", 0.0)
    with StopRequest() as stop:
        stop.folder = tmp_path
        assert not stop.requested
        (tmp_path / "stop").touch()
        assert stop.requested
        assert stop.reason == f"the file {tmp_path / 'stop'}"
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize(
    ("reasons", "asked"),
    [
        (["", "SIGUSR1", "SIGTERM"], "SIGUSR1 on rank 1"),
        (["SIGTERM", "", "the file runs/stop"], "the file runs/stop"),
        (["", ""], ""),
    ],
)
def test_a_file_counts_before_any_signal_whichever_rank_saw_it(reasons, asked):
    assert asked_by(reasons) == asked
