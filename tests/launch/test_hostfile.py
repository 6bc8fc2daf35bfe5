"""Hostfiles: what is read, and what is refused before any program sees it."""

import os
import subprocess
from pathlib import Path

import pytest

from launch.environment import SUSPECTS, TRAVEL, check_plain, left_behind, local_environment, travelling
from launch.hostfile import Host, HostfileError, describe_shape, read_hostfile

HOSTILE = {
    "-oProxyCommand=touch${IFS}CANARY slots=1": "not a host name",
    "$(touch CANARY) slots=1": "not a host name",
    "node1;touch slots=1": "not a host name",
    "`touch` slots=1": "not a host name",
    "root@node1 slots=1": "not a host name",
    "node[1-4] slots=1": "not a host name",
    "^hosts slots=1": "not a host name",
    "exec:node1 slots=1": "not a host name",
    "node1- slots=1": "not a host name",
    "node_1 slots=1": "not a host name",
    "node1%n slots=1": "not a host name",
    "\u0645\u0636\u06cc\u0641 slots=1": "not a host name",
    f"{'a' * 64} slots=1": "not a host name",
    "node1\nnode2 slots=2": "expected slots=N alone",
    "node1 slots=1 slots=2": "expected slots=N alone",
    "node 1 slots=1": "expected slots=N alone",
    "node1 slots=two": "expected slots=N alone",
    "node1 slots=-1": "expected slots=N alone",
    "node1 slots=0": "has slots=0",
    "node1 slots=9999": "has slots=9999",
    "node1 slots=2\nNODE1 slots=2": "on line 1 already",
    "# nothing\n\n": "names no host",
}


def write(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text + "\n")
    return path


def test_hosts_are_read_in_their_order(tmp_path):
    path = write(tmp_path, "# cluster\nnode2 slots=8\n\n  node1.rack-3.lan\tslots=4   # half of it\n10.0.0.7 slots=8")
    hosts = read_hostfile(path)
    assert hosts == (Host("node2", 8), Host("node1.rack-3.lan", 4), Host("10.0.0.7", 8))
    assert describe_shape(hosts) == "3 hosts x 4 to 8 slots = 20 ranks"
    assert describe_shape(hosts[:1]) == "1 host x 8 slots = 8 ranks"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_bad_line_is_one_error_that_names_it(tmp_path, text):
    with pytest.raises(HostfileError, match=HOSTILE[text]) as caught:
        read_hostfile(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "hosts") in str(caught.value)


def test_a_missing_or_huge_hostfile_is_refused(tmp_path):
    with pytest.raises(HostfileError, match="no hostfile"):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(HostfileError, match="too many for a hostfile"):
        read_hostfile(write(tmp_path, "#" * (1 << 20)))


@pytest.mark.parametrize(("stage", "ranks"), [("stage1", 64), ("stage2", 112)])
def test_the_examples_have_the_published_shapes(stage, ranks):
    hosts = read_hostfile(Path(f"launch/hostfiles/{stage}.example"))
    assert sum(host.slots for host in hosts) == ranks


def test_only_listed_variables_travel():
    environ = {"NCCL_DEBUG": "INFO", "NCCL_SECRET": "1", "AWS_SECRET_ACCESS_KEY": "x", "GLOO_X": "1", "HOME": "/root"}
    assert travelling(environ) == {"NCCL_DEBUG": "INFO"}
    assert left_behind(environ) == ["GLOO_X", "NCCL_SECRET"]
    assert travelling({"NCCL_SOCKET_IFNAME": "^lo,docker0", "NCCL_IB_HCA": "=mlx5_0:1"}).keys() == {
        "NCCL_IB_HCA",
        "NCCL_SOCKET_IFNAME",
    }


@pytest.mark.parametrize(
    "value", ["$(touch x)", "`x`", 'a"b', "a b", "a;b", "a\nb", "%h", "~", "{a,b}", "a&b", "*", "\\"]
)
def test_values_that_a_shell_would_read_are_refused(value):
    with pytest.raises(ValueError, match="NCCL_DEBUG"):
        travelling({"NCCL_DEBUG": value})
    with pytest.raises(ValueError, match="run.output"):
        check_plain(value, "run.output")


def test_nothing_else_reaches_deepspeeds_launcher_which_sends_variables_by_rules_of_its_own():
    environ = {
        "PATH": "/bin:/opt/a b:$(x):/usr/bin",
        "HOME": "/h",
        "PYTHONSTARTUP": "x",
        "PDSH_SSH_ARGS": "-v",
        "WCOLL": "f",
    }
    assert local_environment(environ) == {"PATH": "/bin:/usr/bin", "HOME": "/h"}


def test_every_variable_of_env_sh_travels_and_every_one_that_travels_has_a_word_there():
    plain = {"PATH": os.environ["PATH"]}
    out = subprocess.run(["bash", "-c", "set -eu; . launch/env.sh; env -0"], env=plain, capture_output=True, check=True)
    variables = dict(entry.split("=", 1) for entry in out.stdout.decode().split("\0") if entry)
    ours = {name: value for name, value in variables.items() if name not in ("PATH", "PWD", "SHLVL", "_")}
    assert travelling(ours) == ours
    assert len(ours) >= 9
    text = Path("launch/env.sh").read_text()
    assert [name for name in TRAVEL if SUSPECTS.match(name) and name not in text] == []
    for line in text.splitlines():
        assert not line.startswith("export") or "  # " in line, f"no reason: {line}"
