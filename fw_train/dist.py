"""Ranks and what they tell each other; also works in one process, and never pickles.

`start` understands torchrun, the deepspeed launcher, srun and mpirun. Numbers and texts travel as CPU tensors over gloo.
"""

import hashlib
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as c10d
import torch.distributed.distributed_c10d as c10d_internals
from torch import Tensor

log = logging.getLogger(__name__)

DEFAULT_PORT = 29500
FIRST_PORT, PORTS = 15_000, 17_000  # for jobs that bring none: below the ports that systems hand out themselves
FIRST_SPECIAL_STEP = (
    0xFFFFFFF0  # SLURM numbers batch scripts and interactive shells from here; neither was started by srun
)


class LaunchError(RuntimeError):
    """The environment does not say which rank this is, or says it twice."""


class Launch(NamedTuple):
    """What the launcher says about this process."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None  # ranks on this host, where the launcher tells
    address: str | None = None  # of rank 0; None: this process is the whole world
    port: int = DEFAULT_PORT


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


ALONE = Launch("none", 0, 1, 0, 1)


def world_from_env(environ: Mapping[str, str]) -> Launch:
    """The place of this process in the world: the innermost launcher decides, no launcher means one process.

    Every variable of a launcher must be there and agree with the others.
    """
    if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        rank, size, local_rank = _numbers(environ, "torchrun or deepspeed", ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", None))
        return _checked(
            _with_address(Launch("torchrun or deepspeed", rank, size, local_rank, local_size), environ, None)
        )
    if any(name.startswith("OMPI_COMM_WORLD_") for name in environ):
        prefix = "OMPI_COMM_WORLD_"
        names = (f"{prefix}RANK", f"{prefix}SIZE", f"{prefix}LOCAL_RANK", f"{prefix}LOCAL_SIZE")
        rank, size, local_rank, local_size = _numbers(environ, "mpirun", names)
        launch = Launch("mpirun", rank, size, local_rank, local_size)
        return _checked(_with_address(launch, environ, "127.0.0.1" if local_size == size else None))
    if any(name in environ for name in ("SLURM_PROCID", "SLURM_LOCALID")):
        return _checked(_from_slurm(environ))
    return ALONE


def start(timeout_s: float) -> World:
    """Joins the process group of this job, also alone; `timeout_s` bounds every collective of every group made later."""
    launch = world_from_env(os.environ)
    _check_own_name(launch)
    device = _device(launch)
    timeout = timedelta(seconds=timeout_s)
    # DeepSpeed clones the world without a timeout: without these its collectives would wait for half an hour.
    c10d_internals.default_pg_timeout = timeout
    c10d_internals.default_pg_nccl_timeout = timeout
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launch.address is None:
        c10d.init_process_group(backend, store=c10d.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        os.environ.update(
            RANK=str(launch.rank), WORLD_SIZE=str(launch.size), LOCAL_RANK=str(launch.local_rank),
            MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port),
        )  # fmt: skip
        c10d.init_process_group(backend, timeout=timeout)
    local_size = launch.local_size
    if local_size is None:
        local_size = gather_texts(socket.gethostname()).count(socket.gethostname())
    world = World(launch.rank, launch.size, launch.local_rank, local_size, device)
    log.info("started by %s: %d ranks, %d on this host, %s", launch.launcher, world.size, local_size, device)
    return world


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks; the argument stays as it is."""
    return _reduce(tensor, c10d.ReduceOp.SUM)


def all_max(tensor: Tensor) -> Tensor:
    """The largest value over all ranks, element by element."""
    return _reduce(tensor, c10d.ReduceOp.MAX)


def all_equal(text: str) -> bool:
    """Whether all ranks hold the same text; all get the same answer."""
    digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.int32)
    largest, smallest = all_max(torch.cat((digest, -digest))).chunk(2)
    return torch.equal(largest, -smallest)


def gather_texts(text: str) -> list[str]:
    """The texts of all ranks in their order, on every rank."""
    if not c10d.is_initialized():
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(c10d.get_world_size())]
    c10d.all_gather(lengths, torch.tensor([data.numel()]))
    longest = max(int(length) for length in lengths)
    padded = torch.cat((data, data.new_zeros(longest - data.numel())))
    gathered = [torch.empty_like(padded) for _ in lengths]
    c10d.all_gather(gathered, padded)
    return [bytes(row[: int(n)].tolist()).decode() for row, n in zip(gathered, lengths, strict=True)]


def barrier() -> None:
    """Returns when all ranks have come here."""
    if c10d.is_initialized():
        c10d.all_reduce(torch.zeros(1))  # `c10d.barrier` would pick NCCL and a device of its own choice


def finish(world: World) -> NoReturn:
    """Ends a successful process once all ranks have come here; close every file and writer before.

    Skips the interpreter's own shutdown, in which gloo's threads abort about one run in ten.
    """
    log.debug("rank %d is done", world.rank)
    barrier()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def first_host(nodes: str) -> str:
    """The first of SLURM's compressed host list: `rack[01-04,07]n[3-9],login` begins with `rack01n3`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    if first is None:
        raise LaunchError(f"SLURM's list of nodes is '{nodes}'; expected names such as node[01-04]")
    return re.sub(r"\[([^\]\-,]+)[^\]]*\]", r"\1", first.group())


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    tasks = _number(environ, "SLURM_NTASKS", None)
    step = _number(environ, "SLURM_STEP_ID", None)
    if "SLURM_JOB_ID" in environ and (
        step is None or step >= FIRST_SPECIAL_STEP
    ):  # inside the job, but not started by srun
        if tasks is not None and tasks > 1:
            raise LaunchError(
                f"this SLURM job has {tasks} tasks, and this process was started by the batch script itself; start it with "
                f"`srun`, or with torchrun or deepspeed inside the script"
            )
        return ALONE
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    rank, size, local_rank = _numbers(environ, "srun", names)
    local_size = size if size == 1 else _tasks_here(environ)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    job = _number(environ, "SLURM_JOB_ID", None)
    port = DEFAULT_PORT if job is None else FIRST_PORT + (job * 31 + (step or 0)) % PORTS
    launch = Launch("srun", rank, size, local_rank, local_size, port=port)
    return _with_address(launch, environ, first_host(nodes) if nodes else None)


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """This node's entry in SLURM's `8(x3),4`: three nodes of 8 tasks, then one of 4."""
    counts, node = environ.get("SLURM_STEP_TASKS_PER_NODE"), _number(environ, "SLURM_NODEID", None)
    if counts is None or node is None:
        return None
    per_node = [
        int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))
    ]
    return per_node[node] if node < len(per_node) else None


def _number(environ: Mapping[str, str], name: str, default: int | None) -> int | None:
    value = environ.get(name)
    if value is None:
        return default
    if not re.fullmatch(r"\d+", value):
        raise LaunchError(f"{name}='{value}' is not a number; unset it or start through a launcher")
    return int(value)


def _numbers(environ: Mapping[str, str], launcher: str, names: tuple[str, ...]) -> tuple[int, ...]:
    missing = [name for name in names if name not in environ]
    if missing:
        present = ", ".join(f"{name}={environ[name]}" for name in names if name in environ)
        raise LaunchError(
            f"{launcher} sets {', '.join(names)}, but {', '.join(missing)} is missing ({present or 'others are set'}); "
            f"start through the launcher, or unset all of them for one process"
        )
    return tuple(number for name in names if (number := _number(environ, name, None)) is not None)


def _with_address(launch: Launch, environ: Mapping[str, str], address: str | None) -> Launch:
    address = environ.get("MASTER_ADDR") or address
    if launch.size == 1:
        return launch  # no other rank has to find this one
    if address is None:
        raise LaunchError(
            f"{launch.launcher} started {launch.size} ranks, but nothing says where rank 0 is; set MASTER_ADDR to its host "
            f"(and MASTER_PORT to a free port there)"
        )
    port = _number(environ, "MASTER_PORT", launch.port)
    return launch._replace(address=address, port=port if port is not None else launch.port)


def _checked(launch: Launch) -> Launch:
    local_size = launch.size if launch.local_size is None else launch.local_size
    if not (
        launch.rank < launch.size and launch.local_rank < local_size <= launch.size and launch.local_rank <= launch.rank
    ):
        raise LaunchError(
            f"the variables of {launch.launcher} contradict each other: rank {launch.rank} of {launch.size}, local rank "
            f"{launch.local_rank} of {launch.local_size}; some are left over from another launcher: unset them"
        )
    return launch


def _check_own_name(launch: Launch) -> None:
    """gloo tells the other hosts the address that this host's name stands for: 127.0.1.1 would hang them all."""
    on_many_hosts = launch.local_rank != launch.rank or (launch.local_size or launch.size) < launch.size
    if not on_many_hosts or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = "no address"
    if address.startswith("127.") or address == "no address":
        raise LaunchError(
            f"this host's name '{name}' resolves to {address}, where ranks on other hosts cannot reach it; set "
            f"GLOO_SOCKET_IFNAME to the network interface between the hosts (`ip -brief address` lists them), or correct /etc/hosts"
        )


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    index = 0 if visible == 1 else launch.local_rank  # schedulers may show each task its own GPU alone
    if index >= visible:
        raise LaunchError(
            f"local rank {launch.local_rank} has no GPU: {visible} are visible; start {visible} ranks a host"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _reduce(tensor: Tensor, operation: c10d.ReduceOp.RedOpType) -> Tensor:
    result = tensor.detach().clone()
    if c10d.is_initialized():
        c10d.all_reduce(result, operation)
    return result
