"""A rank that does nothing but be watched, for tests/watch/test_watch.py: `python watched.py MODE RANK WORLD FOLDER HANG_S`."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from fw_train.watch.watcher import Watch

STEPS, AT = 24, 12  # what happens to a rank happens at step AT
held = threading.Lock()


def loading_for_ever():
    time.sleep(1000)


def holding_the_interpreter():
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)  # calls through PyDLL keep the GIL
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def decoding_thread():
    with held:
        time.sleep(1000)


def waiting_for_a_thread():
    threading.Thread(target=decoding_thread, daemon=True).start()
    time.sleep(0.2)
    held.acquire()


def stop(process, seconds):
    """Stops a process as a debugger or a scheduler does; `seconds`: and lets it go on after that time."""
    if seconds:
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {process}"])
    os.kill(process, signal.SIGSTOP)


def happen(mode, rank, watch, hang_s):
    last = watch.world - 1
    match mode:
        case "sleep" if rank == last:
            loading_for_ever()
        case "deadlock" if rank == 0:
            waiting_for_a_thread()
        case "gil" if rank == last:
            holding_the_interpreter()
        case "stopped" if rank == 0:
            stop(os.getpid(), None)
        case "killed" if rank == last:
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise" if rank == 1:
            raise ValueError("boom")
        case "both":
            raise ValueError(f"boom of rank {rank}")
        case "echo" if rank == 1:
            time.sleep(1)
            raise ValueError("boom")
        case "echo":
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40023")
        case "no one else" if rank == 1:
            raise ConnectionResetError("reset by peer")
        case "late" if rank == 1:
            for _ in range(8):
                watch.beat("validating", AT, ["late-key"])
                time.sleep(hang_s / 4)
        case "late":  # waits for it
            time.sleep(2 * hang_s)
        case "suspended":
            stop(os.getpid(), 2 * hang_s)
        case "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            for _ in range(8):
                watch.beat("still here", AT)
                time.sleep(hang_s / 4)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def meet(folder, rank, world):
    """Returns when all ranks have come here."""
    (folder / f"came-{rank}").touch()
    while not all((folder / f"came-{other}").exists() for other in range(world)):
        time.sleep(0.05)


def main(mode, rank, world, folder, hang_s):
    folder = Path(folder)
    watch = Watch(folder, rank, world, hang_s=hang_s, first_step_s=1000)
    try:
        if mode == "compile" and rank == 1:
            watch.beat("compiling")
            time.sleep(2 * hang_s)
        for step in range(STEPS):
            watch.beat("data", step, [f"sample-{rank}-{step}"])
            time.sleep(0.05)
            watch.beat("forward", step)
            if step == AT:
                happen(mode, rank, watch, hang_s)
        watch.beat("waiting for the others", STEPS)
        meet(folder, rank, world)
    except Exception as error:
        watch.fail(error)
    print(f"rank {rank} is done", flush=True)
    watch.close()


if __name__ == "__main__":
    mode, rank, world, folder, hang_s = sys.argv[1:]
    main(mode, int(rank), int(world), folder, float(hang_s))
