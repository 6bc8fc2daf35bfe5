"""Real training runs of several ranks that start in a second: a server imports everything once and forks the ranks.

    with TrainingServer() as server:
        run = server.start(["config.yaml", "train.steps=4"], size=2, folder=tmp_path, faults=[Fault("kill", 1, event=7)])
        outcomes = run.wait(60)                       # by rank: return code and output
        steps = read_trace(tmp_path, rank=0)          # what each step did, to the last bit

Ranks run `fw_train.train.main` as a launcher would start it: gloo, the engines, loader processes and files are real. Hooks around
the calls of the loop write the trace and make the faults; the trainer knows nothing of them.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from processes import Outcome, rank_environment

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Fault:
    """What goes wrong on a rank: kill and signal at the call of a hook with this number (`event`, from 1), the rest in a step.

    Events are, in order: each forward pass, each optimiser step, each finished step, each save.
    """

    kind: str  # kill, raise, oom, hang, nan, inf_gradient, flip_weight, flip_frozen, slow, signal, `signal in <phase of the watch>`
    rank: int
    event: int = 0
    step: int = -1
    last_step: int = -1  # with `step`: up to and including this one


class TrainingServer:
    def __init__(self):
        environ = rank_environment(0, 1, 0, {})
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environ.pop(name)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        self._runs = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for run in self._runs:
            run.kill()
        self._process.stdin.close()
        self._process.wait(20)

    def start(self, arguments, *, size, folder, faults=(), env=None, name="run"):
        """Forks the ranks, which write to `folder/<name>-<rank>.log` and `folder/<name>-<rank>.trace`."""
        from torch.distributed import TCPStore

        for run in self._runs:  # a test that failed may have left it
            run.kill()
            run.wait(20)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
        request = {
            "arguments": [str(argument) for argument in arguments],
            "size": size,
            "port": store.port,
            "prefix": str(Path(folder) / name),
            "faults": [asdict(fault) for fault in faults],
            "env": env or {},
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        pids = json.loads(self._process.stdout.readline())
        run = Run(pids, [Path(f"{request['prefix']}-{rank}.log") for rank in range(size)], self._process.stdout, store)
        self._runs.append(run)
        return run

    def run(self, arguments, *, size, folder, timeout_s=120, check=True, **options):
        """Starts, waits and returns the outcomes; with `check` all ranks must end with 0."""
        outcomes = self.start(arguments, size=size, folder=folder, **options).wait(timeout_s)
        if check:
            assert [o.returncode for o in outcomes] == [0] * size, "\n".join(o.output[-6000:] for o in outcomes)
        return outcomes


class Run:
    def __init__(self, pids, logs, results, store):
        self.pids, self._logs, self._results, self._store = pids, logs, results, store
        self._codes = None

    def output(self, rank):
        log = self._logs[rank]
        return log.read_text(errors="replace") if log.exists() else ""

    def wait(self, timeout_s):
        """The outcomes by rank; who is still running after so long is killed and marked."""
        import threading

        late = threading.Event()

        def end():
            late.set()
            self.kill()

        timer = threading.Timer(timeout_s, end)
        timer.start()
        if self._codes is None:
            self._codes = json.loads(self._results.readline())
        timer.cancel()
        self._store = None
        return [Outcome(code, self.output(rank), late.is_set()) for rank, code in enumerate(self._codes)]

    def kill(self):
        if self._codes is None:
            for pid in self.pids:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

    def signal(self, rank, number):
        os.kill(self.pids[rank], number)

    def await_text(self, rank, text, timeout_s=60):
        """Returns once a rank has written this."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output(rank):
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.output(rank)[-6000:]}"
            time.sleep(0.02)


def read_trace(folder, rank=0, name="run"):
    """The lines of a rank's trace; of a run that was started several times, all of them in order."""
    return [json.loads(line) for line in (Path(folder) / f"{name}-{rank}.trace").read_text().splitlines()]


# ---------------------------------------------------------------- In the server and its forked ranks


def serve():
    import torch

    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import torch.distributed.fsdp
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import fw_train.train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        pids = [_fork(rank, request) for rank in range(request["size"])]
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def _fork(rank, request):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the server
        output = os.open(f"{request['prefix']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(rank_environment(rank, request["size"], request["port"], request["env"]))
        code = _train(rank, request)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _train(rank, request):
    import fw_train.train as job

    faults = [Fault(**fault) for fault in request["faults"] if fault["rank"] == rank]
    _Hooks(job, f"{request['prefix']}-{rank}.trace", faults).install()
    return job.main(request["arguments"])


class _Hooks:
    """Stands around what the loop calls."""

    def __init__(self, job, trace, faults):
        self.job, self.trace, self.faults = job, trace, faults
        self.engine, self.keys, self.positions = None, [], []
        self.events, self.step = 0, -1

    def install(self):
        job = self.job
        self._wrap("make_engine", after=self._engine_made)
        self._wrap("train_step", before=self._forward, after=self._forward_done)
        self._wrap("open_monitor", after=self._monitor_made)
        original_saver, original_watch, hooks = job.CheckpointSaver, job.Watch, self

        class Saver(original_saver):
            def save(self, *arguments):
                hooks._event()
                return super().save(*arguments)

        class Watch(original_watch):
            def beat(self, phase, step=-1, *arguments):
                super().beat(phase, step, *arguments)
                hooks.step = step
                for kind, trains in (("flip_weight", True), ("flip_frozen", False)):
                    if phase == "comparing weights" and hooks._now(kind):
                        parameter = next(p for p in hooks.engine.module.parameters() if p.requires_grad == trains)
                        parameter.data.view(-1)[0] += 1
                if any(fault.kind == f"signal in {phase}" for fault in hooks.faults):
                    os.kill(os.getpid(), signal.SIGTERM)

        job.CheckpointSaver, job.Watch = Saver, Watch

    def _wrap(self, name, before=None, after=None):
        original = getattr(self.job, name)

        def wrapped(*arguments, **options):
            if before is not None:
                arguments = before(*arguments, **options) or arguments
            result = original(*arguments, **options)
            return result if after is None else after(result) or result

        setattr(self.job, name, wrapped)

    def _engine_made(self, engine):
        self.engine = engine
        step = engine.step

        def stepping(*arguments, **options):
            self._event()
            return step(*arguments, **options)

        engine.step = stepping

    def _forward(self, module, batch, *rest, **options):
        import torch

        from fw_train.batch import Batch

        self._event()
        self.keys += batch.keys
        self.positions += batch.position.tolist()
        assert isinstance(batch, Batch)
        if self._now("nan"):
            from dataclasses import replace

            batch = replace(batch, latents=torch.full_like(batch.latents, float("nan")))
        if self._now("raise"):
            raise ValueError("a fault was asked for")
        if self._now("oom"):
            raise torch.OutOfMemoryError("CUDA out of memory, said the test")
        if self._now("hang"):
            hang_here()
        if self._now("slow"):
            time.sleep(0.3)
        return (module, batch, *rest)

    def _forward_done(self, losses):
        if self._now("inf_gradient"):
            losses.total.register_hook(lambda gradient: gradient * float("inf"))

    def _now(self, kind):
        return any(
            fault.kind == kind and 0 <= fault.step <= self.step <= max(fault.step, fault.last_step)
            for fault in self.faults
        )

    def _event(self):
        self.events += 1
        for fault in self.faults:
            if fault.event == self.events and fault.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault.event == self.events and fault.kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)

    def _monitor_made(self, monitor):
        step = monitor.step

        def stepped(record):
            self._record(record)
            self._event()
            step(record)
            self.keys, self.positions = [], []

        monitor.step = stepped

    def _record(self, record):
        digest = hashlib.sha256()
        for fragment in sorted(self.engine.fragments(), key=lambda fragment: (fragment.name, fragment.start)):
            digest.update(f"{fragment.name} {fragment.start} {fragment.numel}".encode())
            for tensor in (fragment.master, fragment.exp_avg, fragment.exp_avg_sq):
                digest.update(tensor.contiguous().numpy().tobytes())
        weights = hashlib.sha256()
        for name, parameter in sorted(self.engine.module.named_parameters()):
            local = (
                parameter.to_local() if hasattr(parameter, "to_local") else getattr(parameter, "ds_tensor", parameter)
            )
            weights.update(name.encode() + local.detach().float().contiguous().numpy().tobytes())
        from fw_train.checkpoint.run_state import capture_rng

        line = {
            "step": record.step,
            "losses": {name: float(value).hex() for name, value in record.losses.items() if name != "loss/diffusion"},
            "rate": record.learning_rates,
            "applied": record.applied,
            "keys": self.keys,
            "positions": self.positions,
            "state": digest.hexdigest(),
            "weights": weights.hexdigest(),
            "optimiser_steps": self.engine.optimiser_steps(),
            "rng": hashlib.sha256(json.dumps(capture_rng()).encode()).hexdigest(),
        }
        with open(self.trace, "a") as file:
            file.write(json.dumps(line) + "\n")


def hang_here():
    time.sleep(3600)


if __name__ == "__main__":
    serve()
