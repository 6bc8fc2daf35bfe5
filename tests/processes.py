"""Runs a function or a command in N real gloo processes on this machine, within a time limit, and shows all output on failure.

    def sums(power):                      # module level of a test file; arguments and result must survive JSON
        world = dist.start(20)
        return dist.all_sum(torch.tensor(world.rank ** power)).item()

    assert run_function(sums, 2, size=2) == [1, 1]
    outcomes = run_command([sys.executable, "-m", "fw_train.cli", ...], size=2, check=False)

Each process sees what torchrun would set; the store is held by the calling process, so no port can be taken meanwhile.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
GRACE_S = 10.0  # that the others get once one process has failed
SHOWN = 6000  # characters of output per process


class Outcome(NamedTuple):
    returncode: int  # negative: the signal that ended it
    output: str  # both streams
    timed_out: bool = False  # still running at the limit, or when another process had failed


def run_function(function, *args, size=2, timeout_s=60.0, env=None):
    """The results of `function(*args)` by rank; a failure anywhere is an AssertionError with every rank's output."""
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        source = Path(sys.modules[function.__module__].__file__).resolve()
        call = json.dumps([str(source), function.__name__, args, folder])
        run_command([sys.executable, str(TESTS / "processes.py"), call], size=size, timeout_s=timeout_s, env=env)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def run_command(command, *, size=2, timeout_s=60.0, env=None, check=True, cwd=None):
    """One process per rank; `env` adds to the environment, and a value of None removes. All are gone on return."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    with tempfile.TemporaryDirectory(prefix="output_") as folder:
        logs = [Path(folder) / str(rank) for rank in range(size)]
        processes = []
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as out:
                    environ = rank_environment(rank, size, store.port, env or {})
                    processes.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=out,
                            env=environ,
                            cwd=cwd,
                            start_new_session=True,
                        )
                    )
            late = _wait(processes, timeout_s)
        finally:
            for process in processes:
                _kill(process)
        del store
        outcomes = [
            Outcome(p.returncode, log.read_text(errors="replace"), timed_out=rank in late)
            for rank, (p, log) in enumerate(zip(processes, logs, strict=True))
        ]
    if check and any(outcome.returncode for outcome in outcomes):
        raise AssertionError(
            f"{' '.join(map(str, command))[:300]}\n" + "\n".join(map(_describe, range(size), outcomes))
        )
    return outcomes


def rank_environment(rank, size, port, changes):
    environ = dict(os.environ)
    environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # torchrun's way to say that the store exists already
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    for name, value in changes.items():
        if value is None:
            environ.pop(name, None)
        else:
            environ[name] = value
    return environ


def _wait(processes, timeout_s):
    """Waits for all; once one has failed, only GRACE_S longer. The ranks that were still running."""
    deadline = time.monotonic() + timeout_s
    failed = False
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return set()
        if not failed and any(codes):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            return {rank for rank, code in enumerate(codes) if code is None}
        time.sleep(0.02)


def _kill(process):
    """The process and everything it started: each is the leader of a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _describe(rank, outcome):
    how = "was still running and was killed" if outcome.timed_out else f"ended with {outcome.returncode}"
    cut = "[...] " if len(outcome.output) > SHOWN else ""
    return f"--- rank {rank} {how} ---\n{cut}{outcome.output[-SHOWN:]}"


def _call(text):
    """In the child: the function by file and name, its result as JSON; ends without gloo's flaky shutdown."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the test
    source, name, args, folder = json.loads(text)
    # its directory first, so that it finds the modules beside it
    sys.path.insert(0, str(Path(source).parent))
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    result = getattr(module, name)(*args)
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    import torch.distributed as c10d

    if c10d.is_available() and c10d.is_initialized():
        from fw_train.dist import barrier

        barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    _call(sys.argv[1])
