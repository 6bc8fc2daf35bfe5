"""Who am I, and what do the others say: launchers' variables, collectives, the end of a run."""

import os
import socket
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as c10d

from fw_train import dist
from fw_train.dist import Launch, LaunchError, first_host, world_from_env
from processes import run_command, run_function

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_JOB_ID": "1000", "SLURM_STEP_ID": "2", "SLURM_PROCID": "17", "SLURM_NTASKS": "28", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x3),4", "SLURM_JOB_NODELIST": "gpu[007-010]",
}  # fmt: skip
OMPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in
        {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, dist.ALONE),
        ({"MASTER_ADDR": "node1", "SLURM_JOB_ID": "1"}, dist.ALONE),
        (TORCHRUN | MASTER, Launch("torchrun or deepspeed", 3, 8, 1, 2, "node1", 1234)),
        # deepspeed's name for the ranks of a host; srun around torchrun starts one task a node
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", **MASTER, **SLURM},
            Launch("torchrun or deepspeed", 0, 2, 0, 2, "node1", 1234),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch("torchrun or deepspeed", 0, 1, 0, None)),
        (SLURM, Launch("srun", 17, 28, 1, 8, "gpu007", 15_000 + 31_002 % 17_000)),
        (SLURM | {"SLURM_NODEID": "3"}, Launch("srun", 17, 28, 1, 4, "gpu007", 15_000 + 31_002 % 17_000)),
        (SLURM | MASTER, Launch("srun", 17, 28, 1, 8, "node1", 1234)),
        # a batch script and an interactive shell of a job are one process, not rank 0 of something
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1"}, dist.ALONE),
        (
            {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            dist.ALONE,
        ),
        (OMPI, Launch("mpirun", 1, 2, 1, 2, "127.0.0.1")),
        (OMPI | SLURM | MASTER, Launch("mpirun", 1, 2, 1, 2, "node1", 1234)),
    ],
)
def test_every_launcher_is_understood(environ, expected):
    assert world_from_env(environ) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK is missing"),
        (TORCHRUN, "set MASTER_ADDR"),
        (TORCHRUN | MASTER | {"RANK": "8"}, "contradict each other: rank 8 of 8"),
        (TORCHRUN | MASTER | {"LOCAL_RANK": "2"}, "contradict"),
        (TORCHRUN | MASTER | {"RANK": "0"}, "contradict"),
        (TORCHRUN | MASTER | {"RANK": "-1"}, "RANK='-1' is not a number"),
        (TORCHRUN | MASTER | {"MASTER_PORT": ""}, "MASTER_PORT='' is not a number"),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "set MASTER_ADDR"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE"),
        ({name: value for name, value in SLURM.items() if name != "SLURM_NTASKS"}, "SLURM_NTASKS is missing"),
        (SLURM | {"SLURM_LOCALID": "9"}, "contradict"),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}, "start it with `srun`"),
    ],
)
def test_half_set_or_contradictory_variables_are_an_error(environ, message):
    with pytest.raises(LaunchError, match=message):
        world_from_env(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[3-5,7]", "n3"), ("a,b[1-2]", "a"), ("r[01-04,07]n[3-9]-ib,x", "r01n3-ib"), ("n[08]", "n08")],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_a_name_that_only_this_host_understands_is_an_error_on_many_hosts(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    dist._check_own_name(Launch("x", 1, 2, 1, 2, "a"))  # one host: loopback is right
    with pytest.raises(LaunchError, match="resolves to 127.0.1.1.*GLOO_SOCKET_IFNAME"):
        dist._check_own_name(Launch("x", 1, 2, 0, 1, "a"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    dist._check_own_name(Launch("x", 1, 2, 0, 1, "a"))


def test_collectives_without_a_group():
    value = torch.tensor([2.0])
    assert dist.all_sum(value).item() == dist.all_max(value).item() == 2
    assert dist.all_equal("a")
    assert dist.gather_texts("ä") == ["ä"]
    dist.barrier()


def alone():
    world = dist.start(20)
    return [world.rank, world.size, world.local_rank, world.local_size, world.device.type, c10d.get_world_size()]


def test_one_process_has_a_group_too():
    environ = dict.fromkeys(("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"))
    # RANK stays for the helper's own use in every process; it alone would be half of torchrun's variables
    result = run_function(alone_without_rank, size=1, env=environ)
    assert result == [[0, 1, 0, 1, "cpu", 1]]


def alone_without_rank():
    rank = os.environ.pop("RANK")
    result = alone()
    os.environ["RANK"] = rank
    return result


def two_ranks():
    world = dist.start(25)
    value = torch.tensor([1, 10]) * (world.rank + 1)
    kept = value.clone()
    clone = c10d.new_group()
    return {
        "world": [world.rank, world.size, world.local_rank, world.local_size],
        "sum": dist.all_sum(value).tolist(),
        "max": dist.all_max(-value.float()).tolist(),
        "kept": torch.equal(kept, value),
        "equal": [dist.all_equal("same"), dist.all_equal(f"rank {world.rank}")],
        "texts": dist.gather_texts("é" * world.rank),
        "timeout_s": clone._get_backend(torch.device("cpu")).options._timeout / timedelta(seconds=1),
    }


def test_two_ranks_agree():
    # without LOCAL_WORLD_SIZE, as hand-written launchers do, the ranks count themselves
    for rank, result in enumerate(run_function(two_ranks, size=2, env={"LOCAL_WORLD_SIZE": None})):
        assert result == {
            "world": [rank, 2, rank, 2],
            "sum": [3, 30],
            "max": [-1, -10],
            "kept": True,
            "equal": [True, False],
            "texts": ["", "é"],
            "timeout_s": 25,
        }


FINISH = """
import atexit, sys, torch
from fw_train import dist
world = dist.start(20)
atexit.register(print, "interpreter shutdown")
sys.stdout.write(f"rank {world.rank} says bye")
dist.finish(world)
"""


def test_finish_flushes_and_ends_without_the_interpreters_shutdown():
    outcomes = run_command([sys.executable, "-c", FINISH], size=2)
    assert [outcome.output for outcome in outcomes] == ["rank 0 says bye", "rank 1 says bye"]
