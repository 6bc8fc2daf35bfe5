"""launch/stage1.sh without a single host: what it refuses, and what it asks ssh and pdsh for."""

import os
import subprocess

import pytest
from test_hostfile import HOSTILE
from tiny_training import write_config

SAYS = {
    "node3": "root@node3: Permission denied (publickey).",
    "node4": "ssh: connect to host node4 port 22: No route to host",
    "node5": "ssh: Could not resolve hostname node5: Name or service not known",
}


@pytest.fixture
def stage1(tmp_path):
    """Runs the script; `ssh` and `pdsh` write their arguments down and reach nobody. Its result, and what they were asked."""
    tools, asked = tmp_path / "tools", tmp_path / "asked"
    tools.mkdir()
    cases = "".join(f'  *" {host} "*) echo "{says}"; exit 255 ;;\n' for host, says in SAYS.items())
    for name in ("ssh", "pdsh"):
        tool = tools / name
        # One write a line: several run at once.
        tool.write_text(
            f'#!/bin/bash\nline="{name}$(printf " <%s>" "$@")"\necho "$line" >> {asked}\ncase " $* " in\n{cases}esac\nexit 0\n'
        )
        tool.chmod(0o755)
    config = write_config(tmp_path / "config.yaml", tmp_path / "data", tmp_path / "run")

    def run(hosts, *words, **environ):
        (tmp_path / "hosts").write_text(hosts)
        env = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu", **environ}
        line = ["bash", "launch/stage1.sh", str(tmp_path / "hosts"), "--config", str(config), *words]
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=100)
        return done, asked.read_text().splitlines() if asked.exists() else []

    return run


HOSTILE_HERE = [
    "-oProxyCommand=touch${IFS}CANARY slots=1",
    "$(touch CANARY) slots=1",
    "node 1 slots=1",
    "node1 slots=0",
]


@pytest.mark.parametrize("text", HOSTILE_HERE)
def test_a_hostile_hostfile_is_one_error_and_nothing_runs(stage1, tmp_path, text):
    done, asked = stage1(f"node1 slots=2\n{text}\n")
    assert (done.returncode, asked) == (2, [])
    assert done.stderr.count("\n") == 1
    assert "hosts, line 2: " in done.stderr
    assert HOSTILE[text] in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_shape_that_does_not_fit_lists_those_that_do(stage1, tmp_path):
    done, asked = stage1("node1 slots=3\n", "train.global_batch=8")
    assert (done.returncode, asked) == (2, [])
    assert "1 host x 3 slots = 3 ranks: global_batch 8 is not divisible" in done.stderr
    assert "use one of [1, 2, 4, 8] GPUs" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_value_that_a_shell_could_read_is_refused(stage1):
    done, asked = stage1("node1 slots=2\n", NCCL_DEBUG="$(touch CANARY)")
    assert (done.returncode, asked) == (2, [])
    assert "NCCL_DEBUG is '$(touch CANARY)'" in done.stderr
    done, asked = stage1("node1 slots=2\n", "run.output=$(touch CANARY)")
    assert (done.returncode, asked) == (2, [])
    assert "run.output" in done.stderr


def test_hosts_out_of_reach_are_named_together_before_anything_starts(stage1, tmp_path):
    done, asked = stage1("node1 slots=1\nnode3 slots=1\nnode4 slots=1\nnode5 slots=1\n")
    assert done.returncode == 2
    assert "3 of 4 hosts cannot take part; nothing was started" in done.stderr
    assert (
        "node3: root@node3: Permission denied (publickey).; the key is not accepted there: `ssh-copy-id node3`"
        in done.stderr
    )
    assert "node4: ssh: connect to host node4 port 22: No route to host; the host is off or out of reach" in done.stderr
    assert (
        "node5: ssh: Could not resolve hostname node5: Name or service not known; the name is unknown here"
        in done.stderr
    )
    assert len(asked) == 4
    for line in asked:
        assert line.startswith("ssh <-o> <BatchMode=yes> <-o> <ConnectTimeout=10>"), line
    assert list((tmp_path / "run" / ".launch").iterdir()) == []


def test_nothing_of_the_users_is_in_a_line_that_shells_read(stage1, tmp_path):
    """Whatever the user gave travels in a file; a launch that starts no rank fails."""
    done, asked = stage1(
        "node1 slots=1\nnode2 slots=1\n",
        "data.validation=$(touch CANARY)",
        NCCL_IB_HCA="^mlx5_8",
        AWS_KEY="geheim",
        MLFLOW_TOKEN="geheim",
    )
    assert done.returncode == 1, done
    assert "DeepSpeed or pdsh ended before the ranks" in done.stderr
    (pdsh,) = (line for line in asked if line.startswith("pdsh"))
    assert pdsh.startswith("pdsh <-S> <-f> <1024> <-w> <node1,node2> <")
    assert "export NCCL_IB_HCA=^mlx5_8" in pdsh.replace('"', "")
    assert "export OMP_NUM_THREADS=4" in pdsh
    assert f"<--module> <--no_local_rank> <--enable_each_rank_log=None> <launch.rank> <{tmp_path}/run/.launch/" in pdsh
    assert "CANARY" not in "".join(asked)
    assert "geheim" not in "".join(asked)
    sweeps = [line for line in asked if "launch.sweep" in line]
    assert len(sweeps) == 2
    assert "python -m launch.sweep" in sweeps[0]


def test_help_says_how_to_give_another_configuration():
    done = subprocess.run(["bash", "launch/stage2.sh", "--help"], capture_output=True, text=True, check=True)
    assert "--config configs/demo.yaml" in done.stdout


def test_stage_2_needs_what_stage_1_wrote(stage1):
    done, asked = stage1("node1 slots=1\n", "train.stage=stage2", "weights.init_from=outputs/none/step-5.safetensors")
    assert (done.returncode, asked) == (2, [])
    assert "weights.init_from=outputs/none/step-5.safetensors is not there" in done.stderr
