"""Jobs on a real cluster: what interrupts them changes nothing, and each ends as the run's status says."""

import json
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from packed_clips import pack_arguments
from raw_clips import write_clip, write_metadata
from slurm_rig import build_cluster, missing_programs
from tiny_training import make_data, write_config

from data_tools import pack
from fw_train.run.folder import Status, read_status
from processes import run_command

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.skipif(bool(missing_programs()), reason=f"the cluster needs {', '.join(missing_programs())}"),
]

NODES = 4
STEPS = 32


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with tiny_cluster(NODES, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@contextmanager
def tiny_cluster(nodes, folder):
    with build_cluster(nodes, folder) as cluster:
        cluster.environment |= {"OMP_NUM_THREADS": "1", "FW_VENV": sys.prefix, "PYTHONPATH": os.getcwd()}
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    return write_config(path, data, "set run.output", data={"validation": str(data)}, train={"steps": STEPS})


class Demo(NamedTuple):
    """What the demo's jobs left after all that can happen to the first."""

    stage1: object  # folders of the runs
    stage2: object
    log: str  # of the first job, all its starts
    waiting: list  # the second job's state and reason at each interruption of the first


@pytest.fixture(scope="module")
def demo(tmp_path_factory, cluster, config, data):
    out = tmp_path_factory.mktemp("demo")
    environment = {"FW_CONFIG": str(config), "FW_DEMO": str(out), "SBATCH_OUTPUT": f"{out}/%j.log"}
    overrides = [f"data.sources=[{{path: {data}}}]", f"data.validation={data}", f"train.steps={STEPS}"]
    job = cluster.sbatch("launch/slurm/demo.sbatch", *overrides, env=environment)
    run, log, waiting = out / "stage1", out / f"{job}.log", []

    await_step(run, 2)
    second = re.search(r"stage 2 is job (\d+)", log.read_text()).group(1)
    urgent = ["--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null", "--wrap=true"]
    cluster.run("sbatch", *urgent)  # takes the nodes away
    cluster.until(job, "PENDING")
    waiting.append(cluster.state(second))
    cluster.start_now(job)

    await_more_steps(run)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # as SLURM does shortly before the time limit
    cluster.until(job, "PENDING")
    waiting.append(cluster.state(second))
    cluster.start_now(job)

    await_more_steps(run)
    cluster.scontrol("requeue", job)
    waiting.append(cluster.state(second))
    cluster.start_now(job)
    assert cluster.until(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    second_log = out / f"{second}.log"
    assert cluster.until(second, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", second_log.read_text()
    return Demo(run, out / "stage2", log.read_text(), waiting)


def test_three_interruptions_change_nothing(demo, tmp_path, config):
    arguments = [str(config), f"run.output={tmp_path}", "data.workers=0"]
    run_command([sys.executable, "-m", "fw_train.train", *arguments], size=NODES, timeout_s=120)
    assert read_status(demo.stage1) == Status("finished", STEPS, "")
    assert losses(demo.stage1) == losses(tmp_path)


def test_each_start_goes_on_from_the_last_and_the_log_keeps_them_all(demo):
    starts = re.findall(r"start (\d): \S+stage1 on 4 tasks of node\[1-4\]", demo.log)
    assert starts == ["1", "2", "3", "4"]
    resumed = [json.loads(line) for line in (demo.stage1 / "metrics.jsonl").read_text().splitlines()]
    resumed = [line["step"] for line in resumed if line["kind"] == "event" and "resumed" in line["text"]]
    assert len(resumed) == 3
    assert resumed == sorted(set(resumed))
    said = re.findall(r"stage1 is (\w+) at step (\d+)", demo.log)
    assert ("stopped", str(resumed[0])) in said
    assert said[-1] == ("finished", str(STEPS))


def test_stage_2_waits_until_stage_1_has_finished_and_starts_from_its_weights(demo):
    assert demo.waiting == [("PENDING", "Dependency")] * 3
    assert read_status(demo.stage2).state == "finished"
    assert (demo.stage2 / f"step-{STEPS}.safetensors").exists()


def test_stage_2_does_not_start_where_promotion_does_not_pass(cluster, demo, config, tmp_path):
    environment = {"FW_CONFIG": str(config), "FW_STAGE1": str(demo.stage1), "FW_MARKS": "--depth 1e-9"}
    job, log = submit(cluster, tmp_path, "stage2", f"run.output={tmp_path / 'run'}", env=environment)
    assert cluster.until(job, "COMPLETED", "FAILED") == "FAILED"
    assert re.search(
        rf"step {STEPS} of \S+ is not ready for stage 2:\n  the depth loss is \S+, and must be below", log()
    )
    assert "stage 2 does not start" in log()
    assert not (tmp_path / "run").exists()


def test_a_job_that_fails_is_not_started_again(cluster, config, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    old = {"state": "stopped", "step": 3, "reason": "SIGTERM"}  # what an earlier start said does not count
    (run / "status.json").write_text(json.dumps(old, indent=1))
    job, log = submit(cluster, tmp_path, "stage1", f"run.output={run}", "train.stepz=4", env={"FW_CONFIG": str(config)})
    assert cluster.until(job, "COMPLETED", "FAILED") == "FAILED"
    assert "train.stepz" in log()
    assert "has not said why" in log()


def test_a_killed_rank_ends_the_job_and_its_status_says_failed(cluster, config, tmp_path):
    run = tmp_path / "run"
    job, log = submit(cluster, tmp_path, "stage1", f"run.output={run}", env={"FW_CONFIG": str(config)})
    await_step(run, 2)
    (rank,) = cluster.hosts[2].processes("fw_train.train", "run.output")
    rank.kill()
    assert cluster.until(job, "COMPLETED", "FAILED") == "FAILED"
    assert read_status(run).state == "failed"
    assert "submit it again to go on" in log()
    assert "node3: task 2: Killed" in log()


@pytest.mark.slow
def test_a_run_that_lost_a_node_goes_on_with_another(config, tmp_path):
    with tiny_cluster(NODES + 1, tmp_path / "cluster") as cluster:
        run = tmp_path / "run"
        job, log = submit(cluster, tmp_path, "stage1", f"run.output={run}", env={"FW_CONFIG": str(config)})
        await_step(run, 2)
        os.kill(cluster.hosts[2].init, signal.SIGKILL)
        cluster.until(job, "PENDING")
        while "down" not in cluster.run("sinfo", "--noheader", "--nodes=node3", "--format=%T"):
            time.sleep(0.3)
        cluster.start_now(job)
        assert cluster.until(job, "COMPLETED", "FAILED") == "COMPLETED", log()
        assert f"start 2: {run} on 4 tasks of node[1-2,4-5]" in log()
        assert sorted(losses(run)) == list(range(1, STEPS + 1))


def test_an_array_packs_what_one_process_packs(cluster, tmp_path):
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, f"clip{number}") for number in range(9)])
    assert pack.run(pack_arguments(raw, tmp_path / "one", "--shard-size", 2)) == 0
    options = ["--array=1-4", "--cpus-per-task=1", f"--output={tmp_path}/%A-%a.log"]
    words = ["pack", raw, tmp_path / "many", "--shard-size", 2]
    job = cluster.sbatch("launch/slurm/pack.sbatch", *words, options=options)
    deadline = time.monotonic() + 120
    while cluster.run("squeue", "--noheader", "--jobs", job, "--states=PENDING,RUNNING,COMPLETING"):
        assert time.monotonic() < deadline, cluster.describe()
        time.sleep(0.3)
    logs = {path.name: path.read_text() for path in tmp_path.glob("*.log")}
    assert contents(tmp_path / "many") == contents(tmp_path / "one"), logs
    shards = [re.search(r"(\d) shards in this task, 0 finished before", text).group(1) for text in logs.values()]
    assert sorted(shards) == ["1", "1", "1", "2"]
    nodes = cluster.run("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%N").split()
    assert len(set(nodes)) > 1


def submit(cluster, folder, stage, *overrides, env):
    """A job of the real script on small nodes: its number, and a function that reads its log."""
    options = [f"--nodes={NODES}", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={folder}/job.log"]
    job = cluster.sbatch(f"launch/slurm/{stage}.sbatch", *overrides, options=options, env=env)
    return job, (folder / "job.log").read_text


def await_step(run, step, timeout_s=120):
    """The last step that the run has logged, once it is this one."""
    deadline = time.monotonic() + timeout_s
    while True:
        done = max(losses(run), default=0)
        if done >= step:
            return done
        assert time.monotonic() < deadline, f"{run} has done {done} steps"
        time.sleep(0.1)


def await_more_steps(run):
    """Returns when a run that was interrupted has gone on."""
    return await_step(run, max(losses(run)) + 2)


def losses(run):
    """By step, every loss as it was computed."""
    found = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:  # it is being written
            continue
        if values["kind"] == "step":
            assert values["step"] not in found, "a step was logged twice"
            found[values["step"]] = {name: float(x).hex() for name, x in values.items() if name.startswith("loss/")}
    return found


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
