"""Check every node before a run costs anything: code, packages, GPUs, network, folders, limits. Takes at most two minutes.

    fw doctor                                                # this machine
    fw doctor configs/stage1.yaml                            # and what that run needs: data, weights, disk, memory
    fw doctor configs/stage1.yaml --hostfile HOSTS           # every node, by ssh, and the network between them
    srun --ntasks-per-node 1 fw doctor configs/stage1.yaml   # the same within a job; torchrun and deepspeed likewise
    fw doctor --import                                       # only import what training needs, and print the versions

The table has a line for each check and a column for each node; below it stands what to do about each that is not well. Exit code
0: all well (warnings included), 1: something failed, 2: usage. Nothing is changed on the nodes; a folder .fw-doctor-... that comes
and goes in the shared folder aside.
"""

import argparse
import json
import logging
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.doctor_packages import print_imports
from launch.environment import TRAVEL, left_behind, travelling
from launch.hostfile import read_hostfile

if TYPE_CHECKING:
    from fw_train.config import Config
    from launch.doctor_facts import Asked
    from launch.doctor_needs import Needs
    from launch.doctor_verdict import Case

PORT = 29500  # where deepspeed and torchrun let ranks meet


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file: its data, weights and folders are looked at, too"
    )
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="changes to it")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="nodes, as deepspeed takes them; reached by ssh")
    parser.add_argument("--ssh-port", type=int, metavar="N", help="of the nodes' sshd, where it is not ssh's own")
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"where ranks meet on the first node (MASTER_PORT, or {PORT})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all facts and verdicts there")
    parser.add_argument(
        "--import", dest="import_only", action="store_true", help="import what training needs, nothing else"
    )


def run(args: argparse.Namespace) -> int:
    logging.getLogger("numexpr").setLevel(logging.WARNING)  # counts its threads when it is imported
    if args.import_only:
        return print_imports()
    # What follows needs packages whose absence --import reports.
    from fw_train.config import load_config
    from launch.doctor_facts import Asked
    from launch.doctor_verdict import Case

    try:
        chosen = args.port or _port(os.environ.get("MASTER_PORT", ""))
        hosts = read_hostfile(args.hostfile) if args.hostfile else ()
        environment = travelling(os.environ)
        config = load_config(args.config, args.overrides) if args.config else None
        if args.json and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json {args.json}: there is no such folder")
    except (ValueError, OSError) as error:
        print(f"fw doctor: {error}", file=sys.stderr)
        return 2
    asked = Asked(
        folder=str(Path(config.run.output).absolute().parent) if config else os.getcwd(),
        datasets=_given(*(source.path for source in config.data.sources), config.data.validation) if config else (),
        files=_given(config.weights.base, config.weights.init_from) if config else (),
        hosts=tuple(host.name for host in hosts),
        variables=tuple(sorted(TRAVEL)),
        port=chosen or PORT,
    )
    case = Case(
        environment=environment,
        left_behind=left_behind(os.environ),
        slots={host.name: host.slots for host in hosts},
        port_chosen=chosen is not None,
    )
    if hosts:
        from launch.doctor_hosts import ask_hosts

        return report(replace(case, nodes=ask_hosts(asked, environment, args.ssh_port)), config, args.json)
    return _run_here(asked, case, config, args.json)


def report(case: "Case", config: "Config | None", json_file: Path | None) -> int:
    """Prints the table and the remedies; the exit code."""
    from launch.doctor_table import failed, judge, remedies, table

    case = replace(case, needs=_needs(config) if config else None)
    verdicts = judge(case)
    print(table(verdicts, [node.name for node in case.nodes]))
    told = remedies(verdicts)
    print(f"\n{told}" if told else "\nnothing to repair")
    if json_file is not None:
        document = {
            "failed": failed(verdicts),
            "verdicts": [verdict._asdict() for verdict in verdicts],
            "nodes": [asdict(node) for node in case.nodes],
        }
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed(verdicts) else 0


def _given(*paths: str) -> tuple[str, ...]:
    return tuple(path for path in paths if path)


def _port(text: str) -> int | None:
    if text and not re.fullmatch("[0-9]{1,5}", text):
        raise ValueError(f"MASTER_PORT={text!r} is not a port; unset it, or give a free port of the first node")
    return int(text) if text else None


def _needs(config: "Config") -> "Needs | None":
    try:
        from launch.doctor_needs import needs_of
    except ImportError:
        return None  # the table says which package is broken
    return needs_of(config)


def _run_here(asked: "Asked", case: "Case", config: "Config | None", json_file: Path | None) -> int:
    """This process alone, or as one of the ranks that a launcher has started."""
    from fw_train.dist import LaunchError, world_from_env
    from launch.doctor_facts import NetworkFacts, Node
    from launch.doctor_node import look_at_node
    from launch.doctor_shared import try_alone

    try:
        launch = world_from_env(os.environ)
    except LaunchError as error:
        print(f"fw doctor: {error}", file=sys.stderr)
        return 2
    if launch.address is None:
        facts = look_at_node(asked, None)
        node = Node(facts.own_name, facts, NetworkFacts(0, "", rename_error=try_alone(asked.folder)), 0)
        return report(replace(case, nodes=[node]), config, json_file)
    from launch.doctor_ranks import NobodyThere, ask_ranks

    try:
        nodes = ask_ranks(launch, replace(asked, port=None))  # they have met already
    except NobodyThere as error:
        print(f"fw doctor: rank {launch.rank}: {error}", file=sys.stderr)
        return 1
    code = 0 if nodes is None else report(replace(case, nodes=nodes), config, json_file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort an interpreter that shuts down
