"""Packing runs that are killed at random moments, again and again."""

import os
import random
import shutil
import signal
import time

ATTEMPTS_A_KILL = 10  # some runs end before they are killed


def finished_shards(out):
    return len(list(out.glob("shard-*.index.jsonl")))


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_often(start, out, shards, shard_s, kills):
    """How many shards each of so many SIGKILLs left finished; `start(out)` begins a run and returns its process's number.

    A kill comes after up to half of the shards that are still to do, and a random time later. Where a run ends before it, the
    next one begins with an empty folder.
    """
    rng = random.Random(0)
    left = []
    for _ in range(ATTEMPTS_A_KILL * kills):
        out.mkdir(exist_ok=True)
        before, done = set(os.listdir(out)), finished_shards(out)
        wanted = done + rng.randrange(1 + (shards - done) // 2)
        pid = start(out)
        while not _has_ended(pid) and (finished_shards(out) < wanted or set(os.listdir(out)) == before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, shard_s))
        os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        if code == -signal.SIGKILL:
            left.append(finished_shards(out))
        else:
            assert code == 0
            shutil.rmtree(out)
        if len(left) == kills:
            return left
    raise AssertionError(f"only {len(left)} of {kills} kills came before the end of a run")


def _has_ended(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
