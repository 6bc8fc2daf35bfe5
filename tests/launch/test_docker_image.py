"""The image, built and run without an engine: every step of the Dockerfile, two containers as nodes, and a launch over them.

The quick build finds Python's packages on this machine instead of installing them again; --slow installs them all.
"""

import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import hosts_rig
import image_rig
import pytest
from tiny_training import make_data, write_config

BASE = "docker.io/nvidia/cuda:12.6.3-base-ubuntu24.04"
TOP = Path(__file__).parents[2]
PRIVATE = ("outputs/run/step-1.safetensors", "data/clip.mp4", "keys/id_ed25519", ".env", "fw_train/.token", "notes.txt")
IN_IMAGE = {".venv", "LICENSE", "README.md", "configs", "data", "data_tools", "fw_train", "fw_train.egg-info", "launch",
            "models", "outputs", "pyproject.toml", "requirements.txt"}  # fmt: skip
ENTRY = "/opt/fw_train/launch/docker/entrypoint.sh"
NODE = ("tini", "-s", "--", ENTRY, "node")  # -s: here it is not the first process of its space
lacking = [*image_rig.missing_programs(), *hosts_rig.missing_programs()]
pytestmark = [
    pytest.mark.multinode,
    pytest.mark.skipif(bool(lacking), reason=f"the image needs {', '.join(lacking)}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Readable for the image's user."""
    made = tmp_path_factory.mktemp("image")
    for place in (made, made.parent):
        place.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def context(folder):
    """The checkout as docker finds it, with things beside it that are nobody's business."""
    copy = folder / "context"
    names = ("configs", "data_tools", "docs", "fw_train", "launch", ".dockerignore", "Dockerfile", "LICENSE", "README.md",
             "pyproject.toml", "requirements.txt")  # fmt: skip
    for name in names:
        (shutil.copytree if (TOP / name).is_dir() else shutil.copy)(TOP / name, copy / name)
    for name in PRIVATE:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("private")
    return copy


@pytest.fixture(scope="module")
def store(folder):
    with image_rig.storage(folder / "storage") as opened:
        opened.make_base(BASE)
        yield opened


@pytest.fixture(scope="module")
def pip(folder):
    return image_rig.pip_access(folder)


@pytest.fixture(scope="module")
def packages():
    """This machine's packages as a volume."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the stand-in's Python is 3.11: packages of another one cannot be lent to it; --slow installs them")
    return f"{sysconfig.get_paths()['purelib']}:/lent:ro"


@pytest.fixture(scope="module")
def image(store, context, pip, packages):
    """The quick build."""
    # The checkout first: the lent packages hold a link to the one that they belong to.
    store.make_base_with(BASE, "localhost/lending", "PYTHONPATH=/opt/fw_train:/lent")
    log = store.build(
        context,
        "fw-train",
        arguments=["BASE_IMAGE=localhost/lending", "BASE_TAG=latest", "REVISION=v9-test"],
        volumes=[*pip, packages],
    )
    assert "Requirement already satisfied: torch" in log
    return "fw-train"


@pytest.fixture(scope="module")
def shared(folder):
    """What the nodes share: a key, a dataset, a folder for runs; the image's user owns them."""
    make_data(folder / "data")
    for name in ("keys", "outputs"):
        (folder / name).mkdir()
    make_key(folder / "keys/id_ed25519")
    sizes = {"steps": 4, "global_batch": 2}
    write_config(folder / "outputs/config.yaml", "/opt/fw_train/data/packed", "outputs/run", train=sizes)
    (folder / "outputs/hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    subprocess.run(["chown", "--recursive", "1000:1000", folder / "keys", folder / "outputs"], check=True)
    return [f"{folder}/keys:/run/secrets/fw_ssh:ro", f"{folder}/data:/opt/fw_train/data:ro",
            f"{folder}/outputs:/opt/fw_train/outputs"]  # fmt: skip


class Node:
    """A container of the image on a host of the rig, with its ssh server running."""

    def __init__(self, host, container, log):
        self.host, self.container, self.log = host, container, log
        with log.open("w") as out:
            host.start(*container.command(*NODE, hostname=host.name), stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 30
        while "listening on" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def run(self, *command, **keywords):
        return self.host.run(*self.container.command(*command, hostname=self.host.name), **keywords)


@pytest.fixture(scope="module")
def nodes(store, image, packages, shared, folder):
    containers = [store.start(image, [packages, *shared]) for _ in range(2)]
    with hosts_rig.build_hosts(2, folder / "rig") as hosts:
        yield [
            Node(host, container, folder / f"{host.name}.log")
            for host, container in zip(hosts, containers, strict=True)
        ]


def make_key(path):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def test_the_image_says_how_it_is_run(store, image):
    config = store.config(image)
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["tini", "--", ENTRY]
    assert config["Cmd"] == ["node"]
    assert list(config["ExposedPorts"]) == ["2222/tcp"]
    assert config["Healthcheck"]["Test"] == ["CMD", ENTRY, "healthy"]


def test_the_image_holds_the_code_and_nothing_private(store, image):
    root = store.root_of(store.start(image))
    assert {path.name for path in (root / "opt/fw_train").iterdir()} == IN_IMAGE
    assert not [name for name in PRIVATE if (root / "opt/fw_train" / name).exists()]
    assert not list((root / "etc/ssh").glob("ssh_host_*"))
    assert not list((root / "run/fw_ssh").iterdir())
    for emptied in ("var/lib/apt/lists", "home/fw", "root", "tmp"):
        left = [path for path in (root / emptied).rglob("*") if not path.name.startswith((".bash", ".profile"))]
        assert left == []
    assert not list((root / "opt/fw_train").glob("[!.]*/**/__pycache__"))
    assert not list((root / "var/cache/apt").glob("archives/*.deb"))


def test_the_user_owns_its_runs_and_nothing_else(store, image, packages):
    container = store.start(image, [packages])
    assert container.run("id", "-un").stdout == "fw\n"
    assert container.run("touch", "outputs/x").returncode == 0
    for path in ("/opt/fw_train/launch/x", "/opt/fw_train/.venv/x", "/etc/x"):
        assert "Permission denied" in container.run("touch", path, check=False).stderr
    # What the checkout's scripts would install is there.
    said = container.run("bash", "-c", ". launch/venv.sh; fw doctor --import; cat fw_train/revision.txt").stdout
    assert "installing" not in said
    assert "deepspeed" in said
    assert said.endswith("v9-test\n")


def test_nodes_know_each_other_by_host_keys_of_their_own(nodes):
    first, second = nodes
    assert first.run(ENTRY, "healthy").returncode == 0
    for name in ("node1", "node2"):
        assert first.run("ssh", name, "id -un; hostname; command -v fw").stdout.split() == [
            "fw", name, "/opt/fw_train/.venv/bin/fw",
        ]  # fmt: skip
    keys = [node.run("cat", "/run/fw_ssh/host_key.pub").stdout for node in nodes]
    assert keys[0] != keys[1]
    # Killed and started again: another key, and it is known.
    for process in second.host.processes("sshd", "docker/sshd_config"):
        process.kill()
    again = Node(second.host, second.container, second.log)
    assert again.run("cat", "/run/fw_ssh/host_key.pub").stdout != keys[1]
    assert first.run("ssh", "node2", "hostname").stdout == "node2\n"


def test_only_the_shared_key_opens_a_node(nodes, folder):
    first = nodes[0]
    make_key(folder / "stranger")
    outside = ["ssh", "-F", "/dev/null", "-p", "2222", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o",
               "UserKnownHostsFile=/dev/null", "-o", "IdentitiesOnly=yes", "-i"]  # fmt: skip
    refused = first.host.run(*outside, folder / "stranger", "fw@node2", "true", check=False)
    assert "Permission denied (publickey)" in refused.stderr
    assert first.host.run(*outside, folder / "keys/id_ed25519", "fw@node2", "id -un").stdout == "fw\n"
    assert first.host.run(*outside, folder / "keys/id_ed25519", "root@node2", "id -un", check=False).returncode == 255
    # An impostor at the same address has a key that nobody has signed.
    assert first.run("ssh", "-o", "HostKeyAlias=other", "node2", "true", check=False).returncode != 0


def test_a_node_without_its_key_says_what_to_do(store, image):
    container = store.start(image)
    done = container.run(ENTRY, check=False)
    assert "id_ed25519 cannot be read by user 1000" in done.stderr
    assert "--build-arg USER_ID=$(id -u)" in done.stderr
    assert container.run(ENTRY, "id", "-un").stdout == "fw\n"  # other commands need no key


def test_stage_1_trains_over_two_nodes(nodes, folder):
    first = nodes[0]
    done = first.run("launch/stage1.sh", "outputs/hosts", "--config", "outputs/config.yaml", timeout=200)
    assert "launch: 2 hosts x 1 slot = 2 ranks" in done.stdout
    assert "launch: finished at step 4" in done.stdout
    assert '"state": "finished"' in (folder / "outputs/run/status.json").read_text()
    assert (folder / "outputs/run/step-4.safetensors").stat().st_uid == 1000
    assert "v9-test" in (folder / "outputs/run/metrics.jsonl").read_text()


@pytest.mark.slow
def test_every_step_builds_with_the_defaults(store, context, pip):
    log = store.build(context, "fw-train-whole", arguments=["USER_ID=1234", "GROUP_ID=1235"], volumes=pip)
    assert "Successfully installed fw-train" in log
    container = store.start("fw-train-whole")
    assert container.run("id", "-u").stdout == "1234\n"
    assert "torch" in container.run("fw", "doctor", "--import").stdout
    installed = container.run(".venv/bin/pip", "list", "--format=freeze").stdout
    assert "deepspeed==" in installed
    assert "diffusers==" in installed
    assert "pytest==" not in installed
    assert "hadolint" not in installed
