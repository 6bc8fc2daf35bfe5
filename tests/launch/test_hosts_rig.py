"""The rig is what it says: hosts that reach each other by name and ssh, and of which nothing remains."""

import subprocess

import pytest
from hosts_rig import build_hosts, lives, missing_programs

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.skipif(bool(missing_programs()), reason=f"the rig needs {', '.join(missing_programs())}"),
]


def test_hosts_reach_each_other_and_know_their_own_processes(tmp_path):
    with build_hosts(3, tmp_path / "rig") as hosts, build_hosts(2, tmp_path / "other") as others:
        assert hosts[0].run("ssh", "node3", "hostname").stdout == "node3\n"
        assert hosts[0].run("ssh", "node3", "cat", "/etc/hosts").stdout.count("node") == 3
        assert others[1].run("ssh", "node1", "hostname -I").stdout.strip() == "10.77.0.1"
        said = hosts[0].run("pdsh", "-R", "ssh", "-S", "-w", "node[1-3]", "hostname").stdout
        assert sorted(said.splitlines()) == ["node1: node1", "node2: node2", "node3: node3"]
        hosts[0].run("ssh", "node2", "sleep 987 > /dev/null 2>&1 &")
        (sleeper,) = hosts[1].processes("sleep 987")
        assert hosts[0].processes("sleep 987") == []
        inits = [host.init for host in (*hosts, *others)]
    for process in (sleeper.pid, *inits):
        assert not lives(process), process
    assert "10.77.0" not in subprocess.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout
