"""Whoever starts the ranks, the numbers are the same to the last bit."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file
from slurm_rig import build_cluster, missing_programs
from tiny_training import make_data, write_config

from fw_train.run.folder import Status, read_status

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.skipif(bool(missing_programs()), reason=f"the cluster needs {', '.join(missing_programs())}"),
]

STEPS = 12
WORLDS = {1: ("python", "torchrun", "hostfile", "srun"), 4: ("torchrun", "hostfile", "srun")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of all runs by size of the world and launcher."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder / "tiny.yaml", make_data(folder), "set run.output", train={"steps": STEPS})
    with build_cluster(4, folder / "cluster") as cluster:
        cluster.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        cluster.environment["PATH"] = f"{sys.prefix}/bin:{cluster.environment['PATH']}"

        def start(world, launcher):
            output = folder / f"{launcher}-{world}"
            hosts = folder / f"hosts-{world}"
            hosts.write_text("".join(f"{host.name} slots=1\n" for host in cluster.hosts[:world]))
            arguments = [config, f"run.output={output}"]
            command = {
                "python": ["python", "-m", "fw_train.train", *arguments],
                "torchrun": ["torchrun", f"--nproc-per-node={world}", "-m", "fw_train.train", *arguments],
                "hostfile": ["launch/stage1.sh", hosts, "--config", *arguments],
                "srun": [
                    "srun",
                    f"--nodes={world}",
                    "--ntasks-per-node=1",
                    "python",
                    "-m",
                    "fw_train.train",
                    *arguments,
                ],
            }[launcher]
            cluster.run(*command, timeout=200)
            return output

        with ThreadPoolExecutor(2) as pool:  # launchers wait a lot
            found = {(w, name): pool.submit(start, w, name) for w, names in WORLDS.items() for name in names}
        return {key: future.result() for key, future in found.items()}


@pytest.mark.parametrize(("world", "launcher"), [(w, name) for w, names in WORLDS.items() for name in names[1:]])
def test_losses_and_weights_are_those_of_the_first_launcher(runs, world, launcher):
    first, other = runs[world, WORLDS[world][0]], runs[world, launcher]
    for run in (first, other):
        assert read_status(run) == Status("finished", STEPS, "")
        assert facts(run, "run")[0]["world_size"] == world
    assert losses(other) == losses(first)
    assert len(losses(first)) == STEPS
    ours, theirs = (load_file(run / f"step-{STEPS}.safetensors") for run in (other, first))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(run):
    """Every loss of every step as it was computed."""
    lines = facts(run, "step")
    return [{name: float(x).hex() for name, x in line.items() if name.startswith("loss/")} for line in lines]


def facts(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]
