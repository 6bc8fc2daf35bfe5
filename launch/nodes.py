"""Trains on the hosts of a hostfile: DeepSpeed's launcher over pdsh, checked before and watched over until the last process.

    launch/stage1.sh HOSTFILE                                   configs/stage1.yaml; 8 hosts x 8 slots, or what fits the batch
    launch/stage2.sh HOSTFILE weights.init_from=outputs/stage1/step-20000.safetensors
    launch/stage1.sh HOSTFILE --config configs/demo.yaml train.steps=20

A hostfile has one host a line, `node1 slots=8`; ranks are numbered in its order. All hosts share the checkout, its virtual
environment and the run's folder under the same paths. SIGTERM, SIGINT (Ctrl-C) and SIGHUP stop the run after its step, saved; a
second one ends it at once. The same command goes on where the run was.

What remains: logs/rank-NNNNN.log of each rank and logs/launcher.log in the run's folder. Exit code 0: the run has finished, or
was told to stop; 1: it failed; 2: nothing was started.
"""

import argparse
import os
import re
import secrets
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fw_train.config import Config, load_config
from fw_train.data.order import accumulation_steps
from fw_train.run.folder import current_token
from launch.environment import check_plain, left_behind, local_environment, travelling, write_env_file
from launch.hostfile import Host, describe_shape, read_hostfile
from launch.launch_file import Launch, write_launch
from launch.outcome import judge
from launch.remote import explain, run_on_all, ssh_options
from launch.supervise import Told, show, supervise, tell
from launch.sweep import MARK

CHECKOUT = Path(__file__).resolve().parent.parent
FIRST_PORT, PORTS = 15_000, 17_000  # below the ports that systems hand out themselves
SWEEP_S = 4  # to connect to a host that answered before, and may be the one that was lost
NO_FOLDER, NO_PYTHON, NOT_SHARED = 41, 42, 43


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(arguments)
    try:
        return launch_on(args)
    except (ValueError, OSError) as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2


def launch_on(args: argparse.Namespace) -> int:
    """Everything from the hostfile to the exit code."""
    told = Told()
    for tool in ("ssh", "pdsh"):
        if shutil.which(tool) is None:
            raise ValueError(f"{tool} is not installed here: apt-get install openssh-client pdsh")
    hosts = read_hostfile(args.hostfile)
    overrides = [f"train.stage={args.stage}", *args.overrides] if args.stage else list(args.overrides)
    config = load_config(args.config, overrides)
    tell(describe_batch(hosts, config))
    _check_init_from(config)
    output = Path(config.run.output).absolute()
    for what, path in (("the checkout", CHECKOUT), ("the Python to run", sys.executable), ("run.output", output)):
        check_plain(str(path), f"the path of {what}")
    variables = travelling(os.environ)
    for name in left_behind(os.environ):
        tell(f"{name} is set here and does not reach the hosts; if they need it, add it to launch/environment.py")

    (output / "logs").mkdir(parents=True, exist_ok=True)
    changes = [word for field in args.allow_change for word in ("--allow-change", field)]
    launch = Launch(secrets.token_hex(8), (str(args.config), *overrides, *changes), str(output), current_token(output))
    folder = output / ".launch" / launch.id
    folder.mkdir(parents=True)
    try:
        write_launch(folder / "launch.json", launch)
        write_env_file(folder / "environment", {**variables, MARK: launch.id})
        (folder / "hostfile").write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))
        names = [host.name for host in hosts]
        check_hosts(names, folder / "launch.json", args.ssh_port)
        course = supervise(
            command(names[0], folder, os.environ),
            _environ(folder, args.ssh_port),
            launch.id,
            sum(host.slots for host in hosts),
            output / "logs" / "launcher.log",
            told,
            lambda: _ask_to_stop(launch),
            args.stop_limit,
        )
        _sweep(names, launch.id, args.ssh_port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # keepers on a host that was cut off see that the launch is over
        if told.names:
            (output / "stop").unlink(missing_ok=True)  # a run that ended otherwise has not seen it
    verdict = judge(launch, hosts, course)
    if verdict.code:
        print(f"launch: {verdict.words}", file=sys.stderr)
    else:
        tell(verdict.words)
    return verdict.code


def describe_batch(hosts: Sequence[Host], config: Config) -> str:
    """The shape and its accumulation; an error lists the numbers of ranks that work."""
    ranks = sum(host.slots for host in hosts)
    train = config.train
    try:
        accumulate = accumulation_steps(train.global_batch, ranks, train.micro_batch)
    except ValueError as error:
        raise ValueError(f"{describe_shape(hosts)}: {error}") from None
    return (
        f"{describe_shape(hosts)}; {ranks} ranks x micro batch {train.micro_batch} x {accumulate} accumulation "
        f"step{'s' * (accumulate > 1)} = global batch {train.global_batch}"
    )


def check_hosts(names: Sequence[str], shared_file: Path, port: int | None) -> None:
    """An error that names every host that cannot take part, and why; asks all at once."""
    command = (
        f"cd {CHECKOUT} 2>/dev/null || exit {NO_FOLDER}; test -x {sys.executable} || exit {NO_PYTHON}; "
        f"test -r {shared_file} || exit {NOT_SHARED}"
    )
    reasons = {
        NO_FOLDER: f"the checkout {CHECKOUT} is not there; all hosts need it under the same path",
        NO_PYTHON: f"{sys.executable} is not there; all hosts need the same virtual environment",
        NOT_SHARED: f"{shared_file.parents[2]} is not the one seen here; run.output must lie on a shared file system",
    }
    wrong = [
        f"{answer.host}: {reasons[answer.code]}" if answer.code in reasons else explain(answer)
        for answer in run_on_all(names, command, port)
        if answer.code
    ]
    if wrong:
        lines = "".join(f"\n    {line}" for line in wrong)
        raise ValueError(f"{len(wrong)} of {len(names)} hosts cannot take part; nothing was started:{lines}")


def command(first_host: str, folder: Path, environ: Mapping[str, str]) -> list[str]:
    """DeepSpeed's launcher. No text of the user's is on this line, for shells on the hosts read it."""
    port = environ.get("MASTER_PORT") or str(FIRST_PORT + secrets.randbelow(PORTS))
    if not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError(f"MASTER_PORT={port!r} is not a port; unset it, or give a free port of {first_host}")
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hostfile"), "--launcher", "pdsh",
        "--force_multi", "--no_ssh_check", "--no_local_rank", "--master_addr", first_host, "--master_port", port,
        "--module", "launch.rank", str(folder / "launch.json"),
    ]  # fmt: skip


def _environ(folder: Path, port: int | None) -> dict[str, str]:
    return local_environment(os.environ) | {
        "DS_ENV_FILE": str(folder / "environment"),
        "PDSH_SSH_ARGS_APPEND": " ".join(ssh_options(port)),
        "PYTHONUNBUFFERED": "1",
    }


def _check_init_from(config: Config) -> None:
    start = config.weights.init_from
    if start and not Path(start).exists():
        raise ValueError(
            f"weights.init_from={start} is not there; stage 1 writes it, as step-N.safetensors in its folder"
        )


def _ask_to_stop(launch: Launch) -> bool:
    """Asks the run in the way that reaches all its ranks; False while the folder is not its own."""
    if current_token(Path(launch.output)) == launch.before:
        return False
    (Path(launch.output) / "stop").touch()
    return True


def _sweep(names: Sequence[str], launch: str, port: int | None) -> None:
    """Ends what no keeper could end any more, and says where that could not be looked at."""
    line = f"cd {CHECKOUT} && {sys.executable} -m launch.sweep {launch}"
    for answer in run_on_all(names, line, port, connect_s=SWEEP_S):
        if answer.code:
            tell(f"processes of this launch may be left on a host: {explain(answer)}")
        elif answer.output:
            show("".join(f"launch: ended on {answer.host}: {found}\n" for found in answer.output.splitlines())[:-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch.nodes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("stage0", "stage1", "stage2"), help="sets train.stage")
    parser.add_argument(
        "--config", type=Path, required=True, metavar="FILE", help="the configuration; stageN.sh brings its own"
    )
    parser.add_argument("hostfile", type=Path, metavar="HOSTFILE")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="changes to the configuration")
    parser.add_argument(
        "--allow-change", metavar="FIELD", action="append", default=[], help="as of fw train, at a resume"
    )
    parser.add_argument(
        "--ssh-port", type=int, metavar="PORT", help="where sshd listens on the hosts (default: ssh's own)"
    )
    parser.add_argument(
        "--stop-limit", type=float, default=600, metavar="SECONDS", help="how long a stop may take before all is ended"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
