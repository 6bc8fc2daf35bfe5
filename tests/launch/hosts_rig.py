"""Hosts on this machine: each has its own network, host name, processes and mounts, and an sshd with a key that all accept.

    with build_hosts(4, tmp_path / "rig") as hosts:
        file = hosts.hostfile(tmp_path / "hosts", slots=2)      # node1 slots=2, node2 slots=2, ...
        hosts[0].run("bash", "launch/stage1.sh", file)           # as somebody logged in on node1 would
        hosts[1].processes("fw_train.train")[0].kill()

The file system is shared, as clusters have it. The namespaces have no names and nothing in the machine's own network changes, so
any number of rigs stand side by side; all of it ends with the `with`, and with the process that built it. Needs root and
openssh-server, openssh-client, pdsh, iproute2.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

NEEDED = ("sshd", "ssh", "ssh-keygen", "pdsh", "ip", "unshare", "nsenter", "setpriv")
NETWORK = "10.77.0"
START_S = 20.0


class Found(NamedTuple):
    """A process of a host, as the whole machine numbers it."""

    pid: int
    command: str

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)


def lives(pid):
    """Whether there is such a process on this machine, zombies aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


class Host(NamedTuple):
    name: str
    address: str
    init: int  # the host's first process: its sshd; the host ends with it

    def run(self, *command, check=True, timeout=120, **keywords):
        """A command on the host, in this process's folder; its output as text."""
        line = self._entering(command)
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, **keywords)
        if check and done.returncode:
            raise AssertionError(f"{self.name}: {line} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def start(self, *command, **keywords):
        """The same in the background. The Popen is that of `nsenter`; signal the program itself through `processes`."""
        return subprocess.Popen(self._entering(command), **keywords)

    def processes(self, *words):
        """What runs on the host and has all these words in its command; zombies are not listed."""
        space = os.readlink(f"/proc/{self.init}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                if os.readlink(entry / "ns/pid") != space:
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:  # ended meanwhile
                continue
            if command and all(word in command for word in words):
                found.append(Found(int(entry.name), command))
        return sorted(found)

    def _entering(self, command):
        inside = ("nsenter", "-t", str(self.init), "-n", "-u", "-p", "-m", f"--wd={os.getcwd()}")
        return [*inside, *map(str, command)]


class Hosts(tuple):
    """The hosts in their order, node1 first."""

    def hostfile(self, path, slots):
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self))
        return path


def missing_programs():
    """What this machine lacks for a rig; tests skip themselves with it."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0:
        lacking.append("root")
    elif (
        not lacking
        and subprocess.run(["unshare", "-n", "-u", "-p", "-m", "-f", "true"], capture_output=True).returncode
    ):
        lacking.append("leave to make namespaces (a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN)")
    return lacking


@contextmanager
def build_hosts(count, folder, names=None):
    """`count` running hosts; `folder` takes keys, configuration and the log of each sshd."""
    names = names or [f"node{number}" for number in range(1, count + 1)]
    ssh, hosts_file = _write_files(Path(folder), names)
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces(["-n"], ["sleep", "infinity"]))
        hosts = []
        for name in names:
            log = folder / f"sshd-{name}.log"
            # The cgroup mount is for slurmd, which loads a cgroup plugin whatever it is told. What ~/.bashrc starts on every
            # login may hold locks (pyenv does), and tests kill logins.
            script = f"""set -e
                hostname {name}
                mount --make-rprivate /
                mount -t tmpfs tmpfs /dev/shm
                mount -t tmpfs tmpfs /sys/fs/cgroup
                mount --bind {hosts_file} /etc/hosts
                mount --bind {ssh} /etc/ssh
                test ! -e ~/.bashrc || mount --bind /dev/null ~/.bashrc
                exec {shutil.which("sshd")} -D -e -f {ssh}/sshd_config"""
            own = ["-n", "-u", "-p", "-m", "-f", "--mount-proc", "--kill-child"]
            init = stack.enter_context(_namespaces(own, ["bash", "-c", script], log))
            hosts.append((name, init, log))
        _ip(switch, "link add br0 type bridge", "link set br0 up")
        for number, (_, init, _) in enumerate(hosts, start=1):
            link = f"link add eth0 netns {init} type veth peer name p{number} netns {switch}"
            subprocess.run(["ip", *link.split()], check=True)
            _ip(switch, f"link set p{number} master br0 up")
            _ip(init, f"addr add {NETWORK}.{number}/24 dev eth0", "link set eth0 up", "link set lo up")
        for name, _, log in hosts:
            _until(lambda log=log: "listening on" in log.read_text(), f"{name}: no sshd; see {log}")
        yield Hosts(Host(name, f"{NETWORK}.{n}", init) for n, (name, init, _) in enumerate(hosts, start=1))


def _write_files(folder, names):
    ssh = folder / "ssh"
    ssh.mkdir(parents=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it
    for key in ("hostkey", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], check=True)
    (ssh / "authorized_keys").write_bytes((ssh / "id.pub").read_bytes())
    (ssh / "sshd_config").write_text(
        f"HostKey {ssh}/hostkey\nAuthorizedKeysFile {ssh}/authorized_keys\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nPidFile none\nUseDNS no\nMaxStartups 100\n"
    )
    (ssh / "ssh_config").write_text(
        f"Host *\n  IdentityFile {ssh}/id\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    hosts_file = folder / "hosts"
    lines = [f"{NETWORK}.{number} {name}\n" for number, name in enumerate(names, start=1)]
    hosts_file.write_text("127.0.0.1 localhost\n" + "".join(lines))
    return ssh, hosts_file


@contextmanager
def _namespaces(own, command, log=None):
    """A process in new namespaces, as its number on this machine; the death of the caller is the death of it, too."""
    unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", *own, *command]
    with open(log or os.devnull, "wb") as out:
        process = subprocess.Popen(unshare, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    first = process.pid
    try:
        mine = os.readlink("/proc/self/ns/net")
        _until(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != mine, "no network namespace; are you root?")
        if "-f" in own:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            _until(lambda: children.read_text().split(), "unshare started nothing")
            first = int(children.read_text().split()[0])
        yield first
    finally:
        process.kill()  # --kill-child, and with the first process of a PID namespace the kernel kills all others
        process.wait()
        _until(lambda: not lives(first), f"process {first} does not end")


def _ip(inside, *commands):
    line = ["nsenter", "-t", str(inside), "-n", "ip", "-batch", "-"]
    subprocess.run(line, input="\n".join(commands) + "\n", text=True, check=True)


def _until(condition, otherwise):
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.02)
