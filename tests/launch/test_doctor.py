"""`fw doctor` on this machine and between two processes of it, with what can go wrong made to go wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as c10d
from doctor_findings import cpu_facts
from tiny_training import make_data, write_config

import launch
from fw_train.cli import main
from fw_train.dist import Launch
from launch import doctor_node, doctor_ranks
from launch.doctor_facts import Asked
from launch.doctor_gemm import relative_error
from launch.doctor_gpu import GEMM_MARK, _outcome, ask_nvidia_smi, run_gemms
from launch.doctor_network import _group, reduce_and_time
from launch.doctor_node import look_at_node, port_error, read_dataset, read_file, tree_hash
from launch.doctor_ranks import NobodyThere, ask_ranks
from processes import run_command

ROOT = Path(launch.__file__).parent.parent
FW = [sys.executable, "-m", "fw_train.cli"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor_node, "GEMM_TIMEOUT_S", 200.0)  # machines that run tests are busy


def statuses(path, node=None):
    """{check: worst status} of what --json wrote."""
    order = ["ok", "skip", "warn", "fail"]
    worst = {}
    for verdict in json.loads(path.read_text())["verdicts"]:
        if node in (None, verdict["node"]):
            now = worst.get(verdict["check"], "ok")
            worst[verdict["check"]] = max(now, verdict["status"], key=order.index)
    return worst


def found(path, check):
    return " ".join(v["found"] for v in json.loads(path.read_text())["verdicts"] if v["check"] == check)


def test_a_machine_that_is_well(tmp_path, capsys):
    data = make_data(tmp_path)
    weights = tmp_path / "base.safetensors"
    weights.write_bytes(b"12345")
    config = write_config(tmp_path / "c.yaml", data, tmp_path / "runs" / "a", weights={"base": str(weights)})
    out = tmp_path / "out.json"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    assert main(["doctor", str(config), f"data.validation={data}", "--port", str(port), "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "nothing to repair" in said
    result = statuses(out)
    assert [check for check, status in result.items() if status == "skip"] == ["GPUs", "locked memory"]
    assert set(result.values()) == {"ok", "skip"}
    assert "12 samples" in found(out, "data, weights")
    assert "1 file, 5 bytes" in found(out, "data, weights")
    assert "a save takes" in found(out, "disk")
    assert not list(tmp_path.glob(".fw-doctor*"))


def test_what_is_wrong_here_is_named(tmp_path, capsys, monkeypatch):
    data = make_data(tmp_path)
    manifest = data / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    config = write_config(tmp_path / "c.yaml", data, tmp_path / "a", weights={"base": str(tmp_path / "none")})
    monkeypatch.setenv("NCCL_NOT_LISTED", "1")
    out = tmp_path / "out.json"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["doctor", str(config), "--port", port, "--json", str(out)]) == 1
        assert port_error(int(port)) == f"{port}, where ranks would meet: Address already in use"
    result = statuses(out)
    assert {check: status for check, status in result.items() if status in ("warn", "fail")} == {
        "environment": "warn", "data, weights": "fail", "port": "fail",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "manifest.jsonl is damaged" in found(out, "data, weights")
    assert "none: No such file or directory" in found(out, "data, weights")
    assert "-> mount the same folders on every node" in said
    assert "NCCL_NOT_LISTED is set here and does not travel" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "no configuration file missing.yaml"),
        (["--hostfile", "hosts"], "'-oProxyCommand=touch' is not a host name"),
        (["--hostfile", "nowhere"], "no hostfile nowhere"),
        (["--json", "nowhere/out.json"], "there is no such folder"),
    ],
)
def test_usage(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("-oProxyCommand=touch slots=1\n")
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_none(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_PORT", "$(touch x)")
    assert main(["doctor"]) == 2
    assert "MASTER_PORT='$(touch x)' is not a port" in capsys.readouterr().err


def test_ranks_that_half_know_who_they_are_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["doctor"]) == 2
    assert "WORLD_SIZE" in capsys.readouterr().err


def test_import_names_what_is_missing(tmp_path):
    (tmp_path / "webdataset.py").write_text("raise ImportError('libfoo.so is not there')\n")
    (tmp_path / "blosc2.py").write_text("__version__ = '9.9'\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([*FW, "doctor", "--import"], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1
    assert "webdataset    MISSING  ImportError: libfoo.so is not there" in done.stdout
    assert "blosc2        9.9" in done.stdout
    assert done.stdout.splitlines()[-1] == "cannot be imported: webdataset; pip install -r requirements.txt"


def test_two_ranks_of_one_node_are_one_column(tmp_path):
    out = tmp_path / "out.json"
    first, second = run_command([*FW, "doctor", "--json", str(out)], cwd=tmp_path)
    assert "nothing to repair" in first.output
    assert "found" not in second.output
    assert len(json.loads(out.read_text())["nodes"]) == 1
    assert [gemm["device"] for gemm in json.loads(out.read_text())["nodes"][0]["facts"]["gemms"]] == ["cpu", "cpu"]
    assert statuses(out)["all-reduce of all"] == "ok"
    assert "all-reduce of two" not in statuses(out)


def test_a_rank_that_never_comes_is_named_and_one_without_a_first_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_ranks, "START_S", 1.0)
    monkeypatch.setattr(doctor_ranks, "STORE_S", 1.0)
    monkeypatch.setattr(doctor_ranks, "look_at_node", lambda asked, own: cpu_facts())
    first = Launch("torchrun or deepspeed", 0, 3, 0, 1, "127.0.0.1", 0)
    nodes = ask_ranks(first, Asked(folder=str(tmp_path)))
    assert [(node.name, node.trouble) for node in nodes] == [
        ("node1", ""), ("rank 1", "did not come within 1 s"), ("rank 2", "did not come within 1 s"),
    ]  # fmt: skip
    with pytest.raises(NobodyThere, match="127.0.0.1:9, where ranks meet, cannot be used"):
        ask_ranks(first._replace(rank=1, port=9), Asked())
    store = c10d.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # of a rank 0 that says nothing
    with pytest.raises(NobodyThere, match="rank 0 did not come to `members`"):
        ask_ranks(first._replace(rank=1, port=store.port), Asked())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_node_that_differs_in_everything_is_told_apart(tmp_path):
    """Rank 1 has another package, a full /dev/shm, its own disk, another dataset and not every variable."""
    data = make_data(tmp_path)
    config = write_config(tmp_path / "c.yaml", data, tmp_path / "shared" / "runs")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "einops.py").write_text("__version__ = '0.0.1'\n")
    out = tmp_path / "out.json"
    script = """set -e
        export LOCAL_RANK=0 LOCAL_WORLD_SIZE=1
        if [ "$RANK" = 1 ] && [ -z "$INSIDE" ]; then INSIDE=1 exec unshare -m -u bash "$0" "$@"; fi
        if [ "$RANK" = 1 ]; then
            hostname other
            mount --make-rprivate /
            mount -t tmpfs -o size=20M tmpfs /dev/shm
            dd if=/dev/zero of=/dev/shm/full bs=1M count=8 status=none
            mount -t tmpfs tmpfs "$1/shared"
            mount -t tmpfs tmpfs "$1/packed"
            export PYTHONPATH="$1/shadow:$PYTHONPATH"
            unset NCCL_DEBUG
        fi
        shift
        exec "$@"
    """
    (tmp_path / "start.sh").write_text(script)
    command = ["bash", str(tmp_path / "start.sh"), str(tmp_path), *FW, "doctor", str(config), "--json", str(out)]
    changes = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "WARN"}
    first, second = run_command(command, env=changes, check=False, cwd=tmp_path)
    assert (first.returncode, second.returncode) == (1, 0), first.output + second.output
    own, other = socket.gethostname(), "other"
    assert {c for c, status in statuses(out, own).items() if status in ("warn", "fail")} == set()
    assert {c for c, status in statuses(out, other).items() if status in ("warn", "fail")} == {
        "packages", "/dev/shm", "environment", "data, weights", "shared folder",
    }  # fmt: skip
    assert "einops 0.0.1, elsewhere" in found(out, "packages")
    assert "NCCL_DEBUG did not arrive" in found(out, "environment")
    assert statuses(out, own)["all-reduce of two"] == statuses(out, own)["all-reduce of all"] == "ok"
    assert "PYTHONPATH" in found(out, "environment")


def test_a_product_that_crashes_or_hangs_is_a_finding():
    die = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGFPE)})"]
    child = subprocess.Popen(die, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert _outcome("cuda:0", child, 20).error == "killed by signal 8: it said nothing"
    told = f'print(\'{GEMM_MARK}{{"name": "x", "tflops": 1.0}}\', flush=True)'
    child = subprocess.Popen([*die[:2], f"{told}; {die[2]}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert _outcome("cuda:0", child, 20).error.startswith("killed by signal 8")  # whatever it said before
    late = subprocess.Popen(["sleep", "30"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert _outcome("cuda:0", late, 0.2).error == "no result within 0.2 s"
    assert late.returncode == -signal.SIGKILL
    if not torch.cuda.is_available():
        (gemm,) = run_gemms(["cuda:0"], 30)
        assert "ended with 1: " in gemm.error


def test_wrong_products_are_seen():
    a, b = torch.randn(300, 64).bfloat16(), torch.randn(200, 64).bfloat16()
    product = a @ b.T
    assert relative_error(product, a, b) < 0.01
    for rows, columns in (
        (slice(0, 1), slice(None)),
        (slice(None), slice(199, 200)),
        (slice(140, 160), slice(90, 110)),
    ):
        wrong = product.clone()
        wrong[rows, columns] += 8
        assert relative_error(wrong, a, b) > 0.05
    product[150] = float("nan")
    product[0] = float("nan")
    assert not relative_error(product, a, b) < 0.01


def test_what_is_read_is_told(tmp_path):
    (tmp_path / "one").write_bytes(b"123")
    (tmp_path / "two").write_bytes(b"4567")
    assert read_file(str(tmp_path)).found == "2 files, 7 bytes"
    assert read_file(str(tmp_path / "none")).error.endswith("none: No such file or directory")
    assert "manifest.jsonl is missing" in read_dataset(str(tmp_path)).error
    data = make_data(tmp_path, clips=2)
    assert read_dataset(str(data)).found.startswith("2 samples, manifest ")
    for tar in data.glob("*.tar"):
        tar.unlink()  # a manifest alone trains nothing
    assert ".tar" in read_dataset(str(data)).error


def test_a_changed_file_changes_the_code(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    (tmp_path / "fw_train").mkdir()
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch" / "__init__.py"))
    (tmp_path / "fw_train" / "a.py").write_text("x = 1\n")
    before = tree_hash()
    (tmp_path / "fw_train" / "notes.txt").write_text("no code")
    assert tree_hash() == before
    (tmp_path / "fw_train" / "a.py").write_text("x = 2\n")
    assert tree_hash() != before


def test_names_that_nobody_knows_have_no_address():
    assert doctor_node.resolve("localhost") == "127.0.0.1"
    assert doctor_node.resolve("no-such-host.invalid") == ""


@pytest.mark.gpu
def test_a_gpu_multiplies_reduces_and_is_described():
    gpus, note = ask_nvidia_smi(20)
    assert note == ""
    assert gpus[0].memory_mib > 1000
    (gemm,) = run_gemms(["cuda:0"], 40)
    assert gemm.error == ""
    assert gemm.tflops > 1
    device = torch.device("cuda:0")
    assert reduce_and_time(_group(c10d.HashStore(), 0, 1, device), 0, 1, device)[1] == ""
    facts = look_at_node(Asked(), None)
    assert len(facts.gemms) == torch.cuda.device_count()
