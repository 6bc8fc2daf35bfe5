"""launch/stage1.sh on real hosts: it trains over pdsh, and whatever is killed, everything ends and the next start goes on."""

import contextlib
import json
import os
import signal
import subprocess
import time

import pytest
from hosts_rig import build_hosts, missing_programs
from tiny_training import make_data, write_config

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.skipif(bool(missing_programs()), reason=f"the rig needs {', '.join(missing_programs())}"),
]

START_S = 300.0  # patience until the first steps; half a minute where two cores have nothing else to do
GUARD = {
    "hang_s": 100,
    "first_step_s": 300,
    "collective_s": 300,
}  # the trainer itself must find nothing before the launcher does
END_S = 15.0  # from any failure to the last process
BUSY = 20  # processes that want to run, where these tests alone make eight: a machine that does other things too


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with build_hosts(4, tmp_path_factory.mktemp("rig")) as four:
        yield four


@pytest.fixture(autouse=True)
def nothing_left_for_the_next_test(hosts):
    yield
    for host in hosts:
        for found in host.processes():
            if "[listener]" not in found.command:
                with contextlib.suppress(ProcessLookupError):
                    found.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


class Launched:
    """launch/stage1.sh on the first host, in the background."""

    def __init__(self, hosts, folder, config, *words, slots=2):
        self.hosts, self.folder = hosts, folder
        self.before = read_status(folder)
        hostfile = folder.parent / "hostfile"
        hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
        self.process = hosts[0].start(
            "bash", "launch/stage1.sh", hostfile, "--config", config, *words,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait_for_step(self, step):
        deadline = time.monotonic() + START_S
        while True:
            status = read_status(self.folder)
            if status != self.before and status["state"] == "running" and status["step"] >= step:
                return
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline, left_on(self.hosts)
            time.sleep(0.1)

    def end(self, limit_s=END_S):
        """Its exit code and output, when it and all it started have gone."""
        limit_s *= 1 if os.getloadavg()[0] < BUSY else 4
        deadline = time.monotonic() + limit_s
        while (left := left_on(self.hosts)) or self.process.poll() is None:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        took = limit_s - (deadline - time.monotonic())
        output = self.process.communicate(timeout=5)[0]
        print(f"{took:.1f} s until the last process had ended\n{output}")
        return self.process.returncode, output

    def kill(self, host, *words, number=signal.SIGKILL):
        found = host.processes(*words)
        assert found, left_on(self.hosts)
        for process in found:
            process.kill(number)


def read_status(folder):
    try:
        return json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return {"state": "", "step": -1}


def left_on(hosts):
    """All processes of the hosts but sshd's own: one whose connection is cut waits long for an answer."""
    return [
        (host.name, found.command)
        for host in hosts
        for found in host.processes()
        if not found.command.startswith("sshd")
    ]


def long_run(tmp_path, data, **train):
    return write_config(
        tmp_path / "config.yaml", data, tmp_path / "run", train={"steps": 1000, "global_batch": 8, **train}, guard=GUARD
    )


def last_checkpoint(folder):
    return max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_a_stage_trains_over_four_hosts_and_shows_rank_0(hosts, data, tmp_path):
    config = write_config(
        tmp_path / "config.yaml",
        data,
        tmp_path / "run",
        train={"steps": 6, "global_batch": 16, "precision": "bf16"},
        guard=GUARD,
    )
    code, output = Launched(hosts, tmp_path / "run", config).end(START_S)
    assert code == 0, output
    assert "4 hosts x 2 slots = 8 ranks; 8 ranks x micro batch 1 x 2 accumulation steps = global batch 16" in output
    assert "step 6/6" in output
    assert output.rstrip().endswith("launch: finished at step 6")
    assert "[INFO]" not in output
    assert read_status(tmp_path / "run")["state"] == "finished"
    names = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert names == ["launcher.log", *(f"rank-{rank:05}.log" for rank in range(8))]
    assert "on node3" in (tmp_path / "run" / "logs" / "rank-00004.log").read_text()


def test_whatever_is_killed_everything_ends_and_the_next_start_goes_on(hosts, data, tmp_path):
    run, config = tmp_path / "run", long_run(tmp_path, data)

    launched = Launched(hosts, run, config)
    launched.wait_for_step(4)
    rank = hosts[2].processes("-m fw_train.train")[1]
    rank.kill()
    code, output = launched.end()
    assert code == 1, output
    assert "on node3 was killed by signal 9 (SIGKILL)" in output
    assert "the last lines of" in output
    status = read_status(run)
    assert status["state"] == "failed"
    assert "on node3 was killed by signal 9" in status["reason"]

    saved = last_checkpoint(run)
    launched = Launched(hosts, run, config)
    launched.wait_for_step(saved + 4)
    launched.kill(hosts[3], "sshd: root@")
    code, output = launched.end()
    assert code == 1, output
    assert "resumed on 8 ranks" in output
    assert f"step {saved + 1:4}/1000  loss" in output
    assert f"step {saved:4}/1000  loss" not in output
    assert "host node4 (ranks 6, 7): ssh exited with exit code 255" in output
    assert read_status(run)["state"] == "failed"

    saved = last_checkpoint(run)
    launched = Launched(hosts, run, config)
    launched.wait_for_step(saved + 4)
    launched.kill(hosts[0], "-m launch.nodes")
    code, output = launched.end()
    assert code == -signal.SIGKILL  # nsenter ends as its program did
    assert read_status(run)["state"] == "failed"

    launched = Launched(hosts, run, config)
    launched.wait_for_step(last_checkpoint(run) + 1)
    launched.kill(hosts[0], "-m launch.nodes", number=signal.SIGTERM)
    code, output = launched.end()
    assert code == 0, output
    status = read_status(run)
    assert status["state"] == "stopped"
    assert last_checkpoint(run) == status["step"]
    assert f"launch: stopped at step {status['step']}" in output
    assert not (run / "stop").exists()


@pytest.mark.parametrize("victim", ["pdsh", "DeepSpeed's launcher on a host"])
def test_the_death_of_a_program_between_launcher_and_rank_ends_everything(hosts, data, tmp_path, victim):
    run, config = tmp_path / "run", long_run(tmp_path, data)
    two = hosts[:2]
    launched = Launched(two, run, config, slots=1)
    launched.wait_for_step(1)
    if victim == "pdsh":
        launched.kill(two[0], "pdsh -S")
    else:
        launched.kill(two[1], "python -u -m deepspeed.launcher.launch")
    code, output = launched.end()
    assert code == 1, output
    assert "the run failed at step" in output
    if victim != "pdsh":
        assert "node2" in output
    assert read_status(run)["state"] == "failed"


def test_a_second_signal_ends_a_run_that_does_not_stop(hosts, data, tmp_path):
    """The ranks are stopped by the kernel's SIGSTOP: they cannot react to anything."""
    run, two = tmp_path / "run", hosts[:2]
    launched = Launched(two, run, long_run(tmp_path, data), slots=1)
    launched.wait_for_step(1)
    for host in two:
        launched.kill(host, "-m fw_train.train", number=signal.SIGSTOP)
    launched.kill(two[0], "-m launch.nodes", number=signal.SIGINT)
    deadline = time.monotonic() + 30
    while not (run / "stop").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (run / "stop").exists()
    assert launched.process.poll() is None
    launched.kill(two[0], "-m launch.nodes", number=signal.SIGINT)
    code, output = launched.end()
    assert code == 1, output
    assert "SIGINT: the run stops after its step, saved; once more ends it at once" in output
    assert "SIGINT, the second signal" in output
    assert not (run / "stop").exists()
    assert read_status(run)["state"] == "failed"


def test_a_host_that_is_cut_off_ends_the_others_and_by_itself(hosts, data, tmp_path):
    run, two = tmp_path / "run", hosts[2:]
    launched = Launched(two, run, long_run(tmp_path, data), slots=1)
    launched.wait_for_step(1)
    inside = ("nsenter", "-t", str(two[1].init), "-n", "ip", "link", "set", "eth0")
    subprocess.run([*inside, "down"], check=True)
    try:
        code, output = launched.end(40)  # 9 to 12 s pass before ssh gives a silent host up
    finally:
        subprocess.run([*inside, "up"], check=True)
    assert code == 1, output
    assert "host node4 (ranks 1): ssh exited with exit code 255" in output
    assert "processes of this launch may be left on a host: node4" in output
    assert read_status(run)["state"] == "failed"


def test_a_wrong_key_and_a_host_that_is_off_are_named_before_anything_starts(hosts, data, tmp_path):
    config = long_run(tmp_path, data)
    keys = hosts[1].run("awk", "/AuthorizedKeysFile/ {print $2}", "/etc/ssh/sshd_config").stdout.strip()
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\nnode9 slots=1\n10.77.0.99 slots=1\n")
    hosts[1].run("mount", "--bind", "/dev/null", keys)  # as that host sees the file: it accepts no key
    try:
        done = hosts[0].run("bash", "launch/stage1.sh", tmp_path / "hostfile", "--config", config, check=False)
    finally:
        hosts[1].run("umount", keys)
    assert done.returncode == 2, done
    assert "3 of 4 hosts cannot take part; nothing was started" in done.stderr
    assert "node2: root@node2: Permission denied (publickey" in done.stderr
    assert "node9: ssh: Could not resolve hostname node9" in done.stderr
    assert "10.77.0.99: ssh: connect to host 10.77.0.99 port 22: No route to host; the host is off" in done.stderr


@pytest.mark.slow
def test_fourteen_hosts_take_a_step(data, tmp_path):
    """The shape of stage 2, with a slot a host; on two cores the start alone takes a minute."""
    config = write_config(
        tmp_path / "config.yaml", data, tmp_path / "run",
        train={"steps": 1, "global_batch": 14, "warmup_steps": 0}, guard=GUARD,
    )  # fmt: skip
    with build_hosts(14, tmp_path / "rig") as hosts:
        code, output = Launched(hosts, tmp_path / "run", config, slots=1).end(400)
    assert code == 0, output
    assert "14 hosts x 1 slot = 14 ranks; 14 ranks x micro batch 1 x 1 accumulation step = global batch 14" in output
    assert "launch: finished at step 1" in output
