"""A SLURM cluster on this machine: a controller on node1, a slurmd on each host of the hosts' rig, nothing of it faked.

    with build_cluster(4, tmp_path / "rig") as cluster:
        job = cluster.sbatch("launch/slurm/demo.sbatch", "train.steps=20", options=["--nodes=4"])
        cluster.until(job, "RUNNING")
        cluster.scontrol("requeue", job)

Each node shows 2 CPUs and 8 GPUs (which are empty files). Jobs in the partition `main` give way to those in `urgent`, requeued
after 20 seconds of grace. Commands run on node1, with a munged of the rig's own; all of it ends with the `with`. Needs what the
hosts' rig does and Debian's slurm-wlm, slurmctld, slurmd, munge.
"""

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from hosts_rig import build_hosts
from hosts_rig import missing_programs as missing_for_hosts

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
START_S = 60.0

CONFIGURATION = """
ClusterName=rig
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=15
MessageTimeout=10
KillWait=5
MinJobAge=600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node[1-{count}] CPUs=2 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    def __init__(self, hosts, folder):
        self.hosts, self.folder = hosts, folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command, env=None, **keywords):
        """A command on node1, as somebody logged in there gives it; its output without the last line's end."""
        done = self.hosts[0].run(*command, env=self.environment | (env or {}), **keywords)
        return done.stdout.rstrip("\n")

    def sbatch(self, script, *arguments, options=(), env=None):
        """Submits a script and returns the job's number."""
        return self.run("sbatch", "--parsable", *options, script, *arguments, env=env)

    def scontrol(self, *words):
        return self.run("scontrol", *words)

    def state(self, job):
        """SLURM's word for the state, and its reason for it; of an array, those of the first job that is listed."""
        listed = self.run("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T %r", check=False)
        state, _, reason = listed.partition("\n")[0].partition(" ")
        return state, reason

    def until(self, job, *states, timeout_s=120):
        """Returns the first of these states that the job is in."""
        deadline = time.monotonic() + timeout_s
        while (found := self.state(job))[0] not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {found} and not {' or '.join(states)}\n{self.describe()}")
            time.sleep(0.2)
        return found[0]

    def start_now(self, job, timeout_s=120):
        """Lifts the two minutes that a requeued job would wait; returns when it runs again.

        All but three seconds: nodes refuse credentials of the second in which those of the start before were revoked.
        """
        self.until(job, "PENDING", timeout_s=timeout_s)
        self.scontrol("update", f"JobId={job}", "StartTime=now+3")
        self.until(job, "RUNNING", "COMPLETED", "FAILED", timeout_s=timeout_s)

    def describe(self):
        """What a failed test should show."""
        return f"{self.run('squeue', '--states=all', check=False)}\n{self.logs()}"

    def logs(self):
        """The ends of the daemons' logs."""
        found = [self.folder / "slurmctld.log", *sorted(self.folder.glob("slurmd.*.log"))]
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-1500:]}" for log in found if log.exists())


def missing_programs():
    """What this machine lacks for a cluster; tests skip themselves with it."""
    return [*missing_for_hosts(), *(name for name in NEEDED if shutil.which(name) is None)]


@contextmanager
def build_cluster(count, folder):
    """A cluster whose nodes are idle; `folder` takes configuration, logs and state."""
    with build_hosts(count, folder) as hosts, _munged(folder):
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, count=count))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        for number in range(8):
            (folder / f"gpu{number}").touch()
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        cluster = Cluster(hosts, folder)
        with _daemons(cluster):
            yield cluster


@contextmanager
def _daemons(cluster):
    """Controller and slurmds; they live in the hosts' process namespaces and end with them."""
    folder, processes = cluster.folder, []
    try:
        with open(folder / "daemons.out", "wb") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "env": cluster.environment}
            for host, program in [(cluster.hosts[0], "slurmctld -c"), *((host, "slurmd") for host in cluster.hosts)]:
                (folder / f"spool.{host.name}").mkdir(exist_ok=True)
                words = [*program.split(), "-D", "-f", folder / "slurm.conf"]
                processes.append(host.start(*words, start_new_session=True, **streams))
        deadline = time.monotonic() + START_S
        while True:
            if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                said = (folder / "daemons.out").read_text(errors="replace")[-1500:]
                raise RuntimeError(f"the cluster did not start\n{said}\n{cluster.logs()}")
            if _idle(cluster) == len(cluster.hosts):
                break
            time.sleep(0.3)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _idle(cluster):
    words = [
        "timeout",
        "2",
        "sinfo",
        "-h",
        "-N",
        "-p",
        "main",
        "-t",
        "idle",
    ]  # it would wait long for a dead controller
    return len(cluster.run(*words, check=False).splitlines())


@contextmanager
def _munged(folder):
    """The daemon that signs SLURM's messages, with a key and a socket of its own; it dies with its caller."""
    key, socket = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = [f"--key-file={key}", f"--socket={socket}", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/seed"]
    command = ["setpriv", "--pdeathsig", "KILL", "munged", "--foreground", "--force", *files]
    with open(folder / "munged.log", "wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not Path(socket).exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"munged did not start; see {folder / 'munged.log'}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()
