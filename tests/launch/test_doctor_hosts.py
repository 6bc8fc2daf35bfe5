"""`fw doctor --hostfile` over real ssh on three hosts: all well, then faults of single hosts, then one that is gone."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from hosts_rig import build_hosts, missing_programs
from slurm_rig import build_cluster
from slurm_rig import missing_programs as missing_for_cluster
from tiny_training import make_data, write_config

from launch.doctor_agent import FACTS
from launch.doctor_facts import Asked
from launch.doctor_hosts import Line, Silent, agent_command
from launch.environment import travelling

ROOT = Path(__file__).resolve().parents[2]
needs_rig = [
    pytest.mark.multinode,
    pytest.mark.skipif(bool(missing_programs()), reason=f"the rig needs {', '.join(missing_programs())}"),
]


def doctor(host, hostfile, *arguments, **variables):
    """Exit code, output and what --json wrote."""
    out = hostfile.parent / "doctor.json"
    out.unlink(missing_ok=True)
    environ = [f"{name}={value}" for name, value in variables.items()]
    command = ["env", "-C", str(ROOT), "OMP_NUM_THREADS=1", *environ, sys.executable, "-m", "fw_train.cli", "doctor"]
    done = host.run(*command, *map(str, arguments), "--hostfile", hostfile, "--json", out, check=False)
    assert out.exists(), done.stdout + done.stderr
    return done.returncode, done.stdout, json.loads(out.read_text())["verdicts"]


def wrong(verdicts):
    """{(check, node): what was found} of what is not well."""
    return {(v["check"], v["node"]): v["found"] for v in verdicts if v["status"] in ("warn", "fail")}


def until(condition, limit_s=20):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return True


def nothing_runs(hosts):
    return until(lambda: not any(host.processes("launch.doctor") for host in hosts))


class TestOnHosts:
    pytestmark = needs_rig

    def test_three_hosts(self, tmp_path):
        data = make_data(tmp_path)
        config = write_config(tmp_path / "c.yaml", data, tmp_path / "runs" / "a")
        with build_hosts(3, tmp_path / "rig") as hosts:
            file = hosts.hostfile(tmp_path / "hosts", slots=2)
            code, said, verdicts = doctor(hosts[0], file, config, NCCL_DEBUG="WARN")
            assert (code, wrong(verdicts)) == (0, {}), said
            checks = {verdict["check"] for verdict in verdicts if verdict["status"] == "ok"}
            assert {"connections", "time", "all-reduce of two", "all-reduce of all", "shared folder", "port"} <= checks
            assert said.splitlines()[0].split() == ["node1", "node2", "node3", "found"]
            assert "all 3 known" in said
            here = {**os.environ, "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "WARN"}
            assert f"{len(travelling(here))} variables arrived" in said
            assert nothing_runs(hosts)
            assert not list(tmp_path.glob("**/.fw-doctor*"))

            # whoever asked is killed: nobody stays behind
            running = hosts[0].start(
                "env", "-C", ROOT, sys.executable, "-m", "fw_train.cli", "doctor", "--hostfile", file
            )
            until(lambda: all(host.processes("launch.doctor_agent") for host in hosts))
            hosts[0].processes("fw_train.cli", "doctor")[0].kill()
            running.wait()
            assert nothing_runs(hosts)

            # node2 and node3 cannot reach each other, node3 has other data under the same name, the port is taken
            hosts[1].run("ip", "route", "add", "unreachable", hosts[2].address)
            taken = "import socket,time; s=socket.create_server(('',29500)); time.sleep(60)"
            listener = hosts[0].start(sys.executable, "-c", taken)
            until(lambda: hosts[0].processes("time.sleep"))
            hosts[2].run("mount", "-t", "tmpfs", "tmpfs", tmp_path / "packed")
            code, said, verdicts = doctor(hosts[0], file, config)
            hosts[0].processes("time.sleep")[0].kill()
            listener.wait()
            hosts[1].run("ip", "route", "del", "unreachable", hosts[2].address)
            found = wrong(verdicts)
            assert code == 1
            assert set(found) == {
                ("port", "node1"), ("data, weights", "node3"), ("connections", "node2"), ("connections", "node3"),
                *(("all-reduce of all", f"node{number}") for number in (1, 2, 3)),
            }  # fmt: skip
            assert "to node3: 10.77.0.3" in found["connections", "node2"]
            assert "Address already in use" in found["port", "node1"]
            assert "not all pairs work" in found["all-reduce of all", "node1"]
            pairs = {v["node"] for v in verdicts if v["check"] == "all-reduce of two" and v["status"] == "ok"}
            assert pairs == {"node1", "node2", "node3"}  # node2 and node3 each with node1

            # node2 has no sshd any more, a node4 was never there
            file.write_text(file.read_text() + "node4 slots=2\n")
            os.kill(hosts[1].init, 9)
            code, said, verdicts = doctor(hosts[0], file)
            found = wrong(verdicts)
            assert code == 1
            assert {node for check, node in found if check == "answers"} == {"node2", "node4"}
            assert "Could not resolve hostname" in found["answers", "node4"]
            assert "FAIL  answers on node4" in said
            assert "names" in {check for check, node in found if node == "node1"}  # nobody knows node4
            whole = [v["node"] for v in verdicts if v["check"] == "all-reduce of all" and v["status"] == "ok"]
            assert whole == ["node1", "node3"]
            assert nothing_runs([hosts[0], hosts[2]])

    def test_a_host_whose_name_is_127_0_1_1(self, tmp_path):
        """gloo would hang: the others are told where it says to be, which is themselves."""
        with build_hosts(2, tmp_path / "rig") as hosts:
            file = hosts.hostfile(tmp_path / "hosts", slots=1)
            own = tmp_path / "own_hosts"
            own.write_text("127.0.0.1 localhost\n127.0.1.1 node2\n10.77.0.1 node1\n")
            hosts[1].run("mount", "--bind", own, "/etc/hosts")
            code, said, verdicts = doctor(hosts[0], file)
            assert code == 1
            found = wrong(verdicts)
            assert "node2 is 127.0.1.1" in found["own name", "node2"]
            assert "GLOO_SOCKET_IFNAME" in said
            assert ("connections", "node1") in found
            code, said, verdicts = doctor(hosts[0], file, GLOO_SOCKET_IFNAME="eth0")
            assert (code, wrong(verdicts)) == (0, {}), said


@pytest.mark.multinode
@pytest.mark.skipif(bool(missing_for_cluster()), reason=f"the cluster needs {', '.join(missing_for_cluster())}")
def test_under_srun_the_tasks_meet_and_the_first_tells(tmp_path):
    """Three tasks on two nodes: one leads each node, the third brings its product and takes part in the last all-reduce."""
    out = tmp_path / "doctor.json"
    with build_cluster(2, tmp_path / "rig") as cluster:
        command = ["srun", "--nodes=2", "--ntasks=3", "--distribution=block", "--overcommit", "env", "-C", str(ROOT)]
        command += [sys.executable, "-m", "fw_train.cli", "doctor", "--json", str(out)]
        said = cluster.run(*command, env={"OMP_NUM_THREADS": "1"})
    document = json.loads(out.read_text())
    assert wrong(document["verdicts"]) == {}, said
    assert [node["name"] for node in document["nodes"]] == ["node1", "node2"]
    assert sorted(len(node["facts"]["gemms"]) for node in document["nodes"]) == [1, 2]
    assert said.count("all-reduce of all") == 1


def test_a_node_that_hangs_says_what_it_was_at(tmp_path):
    """Nobody ever writes into this pipe: who reads waits for ever, as on a file system whose server has gone."""
    os.mkfifo(tmp_path / "weights")
    asked = Asked(folder=str(tmp_path), files=(str(tmp_path / "weights"),))
    line = Line("a", [sys.executable, "-m", "launch.doctor_agent"])
    said = ""

    def reads():
        nonlocal said
        with pytest.raises(Silent) as silent:
            line.ask({"look": asdict(asked)}, FACTS, 0.3)
        said = str(silent.value)
        return "reading" in said

    until(reads, 60)
    assert said == f"no answer within 0 s: reading {tmp_path}/weights"
    line.close()


def test_every_word_reaches_the_far_shell_quoted(monkeypatch, tmp_path):
    folder = tmp_path / "a b$(touch x)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    command = agent_command("node1", {"NCCL_ALGO": "Ring"}, 2222)
    assert command[-2:-1] == ["node1"]
    assert command[command.index("-p") + 1] == "2222"
    assert command.index("--") == len(command) - 3
    assert command[-1].startswith(f"cd '{folder}' && exec env NCCL_ALGO=Ring ")


def test_a_node_that_says_nothing_or_ends_is_told_apart():
    noisy = Line("a", [sys.executable, "-c", f"print('welcome'); input(); print('{FACTS}found')"])
    assert noisy.ask({"look": {}}, FACTS, 20) == "found"
    noisy.close()
    silent = Line("b", ["sleep", "30"])
    with pytest.raises(Silent, match="no answer within 0 s"):
        silent.ask({}, FACTS, 0.3)
    silent.close()
    ended = Line("c", ["bash", "-c", "echo 'cd: no such folder' >&2; exit 1"])
    with pytest.raises(Silent, match="its agent ended with code 1: cd: no such folder"):
        ended.ask({}, FACTS, 20)
    ended.close()
    refused = Line("d", ["bash", "-c", "echo refused >&2; exit 255"])
    with pytest.raises(Silent, match="ssh failed: refused"):
        refused.ask({}, FACTS, 20)
    refused.close()
