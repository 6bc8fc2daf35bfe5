"""The Dockerfile and launch/docker without an engine: linted, nothing private in the context, and what docker is asked for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fw_train
from fw_train.code_version import code_version

TOP = Path(__file__).parents[2]


def test_the_dockerfile_has_no_lint():
    hadolint = Path(sys.executable).with_name("hadolint")
    assert hadolint.exists(), "pip install -r requirements.txt brings hadolint"
    done = subprocess.run([hadolint, TOP / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_versions_stand_on_top_as_arguments():
    text = (TOP / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE))
    assert text.index("ARG BASE_TAG") < text.index("FROM ${BASE_IMAGE}:${BASE_TAG}") < text.index("ARG TORCH=")
    # Docker Hub's short name: a first part with a dot would be another registry's host.
    assert "." not in arguments["BASE_IMAGE"].split("/")[0]
    cuda = tuple(int(part) for part in arguments["BASE_TAG"].split("-")[0].split("."))
    assert (12, 4, 1) <= cuda < (13,)  # 12.4.1 brings cuBLAS 12.4.5.8, the first that multiplies bf16 on the H20
    assert f"torch=={arguments['TORCH']}" in (TOP / "requirements.txt").read_text().splitlines()


def test_the_last_step_imports_what_training_needs():
    steps = [line for line in (TOP / "Dockerfile").read_text().splitlines() if re.match(r"[A-Z]+ ", line)]
    assert steps[-1] == "RUN fw doctor --import"


def test_an_image_knows_the_code_it_was_built_from(tmp_path, monkeypatch):
    package = tmp_path / "fw_train"
    package.mkdir()
    monkeypatch.setattr(fw_train, "__file__", str(package / "__init__.py"))
    assert code_version() == fw_train.__version__
    (package / "revision.txt").write_text("v1-3-gabc\n")
    assert code_version() == f"{fw_train.__version__} v1-3-gabc"


@pytest.fixture
def nodes(tmp_path):
    """Runs launch/docker/nodes.sh; `docker` writes its arguments down. The result, and the lines of what docker was asked."""
    tools, asked = tmp_path / "tools", tmp_path / "asked"
    tools.mkdir()
    docker = tools / "docker"
    docker.write_text(f'#!/bin/bash\necho "$*" >> {asked}\necho 0123456789ab\n')
    docker.chmod(0o755)

    def run(*words, **environ):
        env = {"PATH": f"{tools}:{os.environ['PATH']}", **environ}
        line = ["bash", TOP / "launch/docker/nodes.sh", *map(str, words)]
        done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
        return done, asked.read_text().splitlines() if asked.exists() else []

    return run


@pytest.fixture
def shared(tmp_path):
    keys = tmp_path / "shared" / "keys"
    keys.mkdir(parents=True)
    (keys / "id_ed25519").write_text("a key")
    return tmp_path / "shared"


def test_a_host_of_a_cluster_gets_one_node_with_all_its_gpus(nodes, shared):
    done, (line,) = nodes("cluster", shared, FW_IMAGE="team/fw:7", FW_DOCKER_ARGS="--env NCCL_IB_HCA=mlx5_0")
    assert done.returncode == 0, done.stderr
    assert line.startswith("run --detach --name fw-node ")
    for words in ("--gpus all", "--ipc host", "--network host", "--ulimit memlock=-1", "--env NCCL_IB_HCA=mlx5_0"):
        assert f" {words} " in line
    for volume in ("keys:/run/secrets/fw_ssh:ro", "data:/opt/fw_train/data:ro", "models:/opt/fw_train/models:ro"):
        assert f" --volume {shared}/{volume} " in line
    assert f" --volume {shared}/outputs:/opt/fw_train/outputs " in line
    assert line.endswith(" team/fw:7 node")
    assert (shared / "outputs").is_dir()


def test_a_trial_is_nodes_in_a_network_of_their_own_and_their_hostfile(nodes, shared):
    done, lines = nodes("trial", 3, shared)
    assert done.returncode == 0, done.stderr
    assert (shared / "outputs" / "hosts").read_text() == "node1 slots=1\nnode2 slots=1\nnode3 slots=1\n"
    assert lines[0].startswith("network create ")
    assert [re.search(r"--name (\S+)", line).group(1) for line in lines[1:]] == ["fw-node", "fw-node2", "fw-node3"]
    assert all(f"--hostname node{n} --network-alias node{n} " in line for n, line in enumerate(lines[1:], start=1))
    assert not any("--gpus" in line or "--network host" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("cluster", "relative/folder"), "SHARED must be an absolute path"),
        (("cluster", "/with blank"), "SHARED must be an absolute path"),
        (("cluster", "/nowhere"), "ssh-keygen -t ed25519 -N '' -f /nowhere/keys/id_ed25519"),
        (("trial", "0", "/nowhere"), "nodes.sh trial N SHARED"),
        (("trial", "$(id)", "/nowhere"), "nodes.sh trial N SHARED"),
        ((), "nodes.sh cluster SHARED"),
    ],
)
def test_what_cannot_work_is_said_before_docker_is_asked(nodes, words, message):
    done, lines = nodes(*words)
    assert (done.returncode, lines) == (2, [])
    assert message in done.stderr
