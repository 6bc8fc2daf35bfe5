"""What the batch scripts decide, with programs in the place of srun and scontrol that write down how they are called."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPTS = sorted(Path("launch/slurm").glob("*.sbatch"))

# srun: a probe of a node answers as NODES_DOWN says; anything else is the training and does what TRAINER says.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$TRACE/srun"
if [ "${!#}" = true ]; then
    for down in ${NODES_DOWN:-}; do [[ " $* " == *" --nodelist=$down "* ]] && exit 1; done
    exit 0
fi
eval "$TRAINER"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && { printf '%s\\n' n1 n2 n3; exit; }
printf '%s\\n' "$*" >> "$TRACE/scontrol"
"""
SBATCH = """#!/usr/bin/env bash
printf '%s\\n' "$FW_STAGE $*" >> "$TRACE/sbatch"
echo 8
"""


@pytest.fixture
def shell(tmp_path):
    """Runs lines of bash behind common.sh in a job of three nodes: exit code, output, calls of srun, calls of scontrol."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_JOB_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n1"}
    base = os.environ | job | {"TRACE": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}"}

    def run(lines, **environment):
        for name in ("srun", "scontrol"):
            (tmp_path / name).unlink(missing_ok=True)
        script = f"set -euo pipefail\n. launch/slurm/common.sh\n{lines}"
        done = subprocess.run(
            ["bash", "-c", script], env=base | environment, capture_output=True, text=True, timeout=60, check=False
        )
        calls = [tmp_path / name for name in ("srun", "scontrol")]
        return done.returncode, done.stdout + done.stderr, *(c.read_text() if c.exists() else "" for c in calls)

    return run


def says(run, state, step=3, reason=""):
    """What a trainer does that leaves this in status.json."""
    text = json.dumps({"state": state, "step": step, "reason": reason}, indent=1)
    return f"mkdir -p {run}; printf '%s\\n' '{text}' > {run}/new; mv {run}/new {run}/status.json"


@pytest.mark.parametrize(
    ("state", "trainers_code", "code", "requeued"),
    [
        ("finished", 0, 0, False),
        ("finished", 134, 0, False),  # gloo's way to go
        ("stopped", 0, 0, True),
        ("stopped", 143, 0, True),
        ("failed", 0, 1, False),
        ("failed", 1, 1, False),
        ("running", 137, 1, False),
        ("running", 0, 1, False),
    ],
)
def test_status_json_decides_and_not_the_exit_code(shell, tmp_path, state, trainers_code, code, requeued):
    run = tmp_path / "run"
    ended, _, _, scontrol = shell(
        f"train some.yaml {run}", TRAINER=f"{says(run, state, reason='SIGTERM')}; exit {trainers_code}"
    )
    assert ended == code
    assert scontrol == ("requeue 7\n" if requeued else "")


def test_a_stop_that_somebody_asked_for_with_the_file_stays_a_stop(shell, tmp_path):
    run = tmp_path / "run"
    code, output, _, scontrol = shell(
        f"train some.yaml {run}", TRAINER=says(run, "stopped", reason=f"the file {run}/stop")
    )
    assert (code, scontrol) == (1, "")
    assert f"is stopped at step 3: the file {run}/stop" in output


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_what_an_earlier_start_said_does_not_count(shell, tmp_path, state):
    run = tmp_path / "run"
    subprocess.run(["bash", "-c", says(run, state)], check=True)
    code, output, _, scontrol = shell(f"train some.yaml {run}", TRAINER="exit 0")
    assert (code, scontrol) == (1, "")
    assert "has not said why" in output


def test_a_lost_node_requeues_what_failed_because_of_it(shell, tmp_path):
    run = tmp_path / "run"
    for state in ("failed", "running"):
        trainer = f"{says(run, state)}; exit 1"
        code, output, _, scontrol = shell(f"train some.yaml {run}", TRAINER=trainer, NODES_DOWN="n2 n3")
        assert (code, scontrol) == (0, "requeue 7\n")
        assert "no answer from n2 n3" in output
    code, _, _, scontrol = shell(f"train some.yaml {run}", TRAINER=trainer, NODES_DOWN="n1 n2 n3")
    assert (code, scontrol) == (1, "")  # not one answers, this one included: srun is at fault


def test_signals_of_slurm(shell, tmp_path):
    run = tmp_path / "run"
    ready = tmp_path / "ready"
    wait = f"touch {ready}; sleep 9 > {os.devnull} 2>&1"
    trainer = f"usr1() {{ {says(run, 'stopped', reason='SIGUSR1')}; exit 0; }}; trap usr1 USR1; {wait} & wait"
    tell = "(while [ ! -e {ready} ]; do sleep 0.05; done; kill -{signal} $$) &"
    lines = tell.format(ready=ready, signal="USR1") + f"\ntrain some.yaml {run}"
    code, output, _, scontrol = shell(lines, TRAINER=trainer)
    assert (code, scontrol) == (0, "requeue 7\n"), output
    assert "is stopped at step 3: SIGUSR1" in output

    ready.unlink()
    trainer = f"touch {ready}; sleep 1; {says(run, 'stopped', reason='SIGTERM')}"
    lines = tell.format(ready=ready, signal="TERM") + f"\ntrain some.yaml {run}"
    code, output, _, scontrol = shell(lines, TRAINER=trainer)
    assert (code, scontrol) == (1, ""), output  # SLURM requeues it or has cancelled it
    assert "is stopped at step 3: SIGTERM" in output

    ready.unlink()
    lines = tell.format(ready=ready, signal="USR1") + f"\ntrain some.yaml {run}"
    code, output, _, scontrol = shell(
        lines, TRAINER=f"touch {ready}; sleep 30 > {os.devnull} 2>&1"
    )  # before the trainer listens
    assert (code, scontrol) == (0, "requeue 7\n"), output


def test_a_job_of_an_array_requeues_itself_and_not_the_array(shell):
    environment = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert shell("requeue why", **environment)[3] == "requeue 7_3\n"


def test_overrides_reach_the_trainer_in_their_order(shell, tmp_path):
    run = tmp_path / "my run"
    lines = (
        f'set -- a.b=1 \'run.output={run}\' c.d=2\nfolder=$(run_folder outputs/x "$@")\ntrain some.yaml "$folder" "$@"'
    )
    trainer = f'run="{run}"; mkdir -p "$run"; echo \'{{"state": "finished"}}\' > "$run/status.json"; printf "<%s>" "$@"'
    _, output, _, _ = shell(lines, TRAINER=trainer, SLURM_CPUS_PER_TASK="3", FW_VENV="/venv")
    words = re.search(r"<.*>", output).group()
    assert words.endswith(
        f"<--cpus-per-task=3></venv/bin/python><-m><fw_train.train><some.yaml><run.resume=auto><run.output={run}><a.b=1>"
        f"<run.output={run}><c.d=2>"
    )
    assert "<--kill-on-bad-exit=1>" in words
    assert shell("run_folder outputs/x a.b=1")[1] == "outputs/x\n"
    assert shell("run_folder outputs/x run.output=1 run.output=2")[1] == "2\n"


def test_with_a_container_pyxis_is_told_what_to_mount(shell):
    _, output, _, _ = shell(
        "on_all_tasks $python", TRAINER='printf "<%s>" "$@"', FW_CONTAINER="site#fw:1", FW_MOUNTS="/data,/m:/n"
    )
    here = os.getcwd()
    assert (
        f"<--container-image=site#fw:1><--container-mounts={here}:{here},/data,/m:/n><--container-workdir={here}>"
        in output
    )
    assert output.endswith("<--no-container-entrypoint><python3>")
    _, output, _, _ = shell("on_all_tasks $python", TRAINER='printf "<%s>" "$@"')
    assert "container" not in output
    assert output.endswith("<.venv/bin/python>")


PROMOTE = """if [[ "$*" == *" promote "* ]]; then
    [ -z "$NOT_READY" ] || { echo "the depth loss is 3" >&2; exit 1; }
    echo somewhere/step-9.safetensors
    exit
fi
"""


@pytest.mark.parametrize("not_ready", ["", "yes"])
def test_stage_2_trains_from_what_is_promoted_and_not_at_all_where_nothing_is(shell, tmp_path, not_ready):
    run = tmp_path / "run"
    environment = {"FW_STAGE1": "my/stage1", "FW_MARKS": "--depth 1 --step 9", "NOT_READY": not_ready}
    lines = f". launch/slurm/stage2.sbatch run.output={run} train.steps=5"
    code, output, srun, _ = shell(lines, TRAINER=PROMOTE + says(run, "finished"), **environment)
    promote, *training = srun.splitlines()
    assert promote.endswith("-m fw_train.cli promote my/stage1 --depth 1 --step 9")
    if not_ready:
        assert (code, training) == (1, [])
        assert "the depth loss is 3" in output
        assert "stage 2 does not start" in output
    else:
        assert code == 0
        assert len(training) == 1
        assert training[0].endswith(f"weights.init_from=somewhere/step-9.safetensors run.output={run} train.steps=5")


def test_the_demos_first_start_alone_hands_in_stage_2(shell, tmp_path):
    run = tmp_path / "stage1"
    partition = {"SLURM_JOB_PARTITION": "big", "SLURM_JOB_NUM_NODES": "3", "SLURM_NTASKS_PER_NODE": "1"}
    environment = {"FW_DEMO": str(tmp_path), "TRAINER": says(run, "finished"), **partition}
    lines = ". launch/slurm/demo.sbatch data.sources=[] train.steps=5"
    assert shell(lines, **environment)[0] == 0
    words = (tmp_path / "sbatch").read_text()
    assert words.startswith("stage2 ")
    assert words.endswith("launch/slurm/demo.sbatch data.sources=[] train.steps=5\n")
    assert {"--dependency=afterok:7", "--partition=big", "--nodes=3", "--ntasks-per-node=1"} <= set(words.split())
    (tmp_path / "sbatch").unlink()
    assert shell(lines, SLURM_RESTART_COUNT="1", **environment)[0] == 0
    assert not (tmp_path / "sbatch").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_is_requeued_keeps_its_log_and_is_warned_before_its_time_is_over(script):
    options = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.M)
    given = dict(options)
    assert {"requeue", "open-mode", "signal", "time", "output", "job-name"} <= given.keys()
    assert given["open-mode"] == "append"
    assert re.fullmatch(r"B:USR1@\d+", given["signal"])
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    elsewhere = subprocess.run(["bash", script.resolve()], cwd="/", capture_output=True, text=True, check=False)
    assert elsewhere.returncode == 2
    assert "from the top of the checkout" in elsewhere.stderr


def test_the_published_sizes():
    sizes = {
        path.stem: dict(re.findall(r"^#SBATCH --(nodes|ntasks-per-node|gpus-per-node)=(\d+)$", path.read_text(), re.M))
        for path in SCRIPTS
    }
    assert sizes["stage1"] == {"nodes": "8", "ntasks-per-node": "8", "gpus-per-node": "8"}
    assert sizes["stage2"] == {"nodes": "14", "ntasks-per-node": "8", "gpus-per-node": "8"}
