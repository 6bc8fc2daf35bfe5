"""`fw`: one command for all tools. Exit codes: 0 fine, 1 a check failed or an input cannot be used, 2 wrong usage."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import fw_train


class Command(NamedTuple):
    module: str  # with `add_arguments(parser)`, `run(args) -> int`, and a docstring that is its help
    help: str


class Group(NamedTuple):
    help: str
    commands: dict[str, Command]


COMMANDS: dict[str, Command | Group] = {
    "train": Command("fw_train.train", "train a stage, or go on with a run"),
    "promote": Command("fw_train.commands.promote", "say whether a stage-1 run is ready for stage 2"),
    "eval": Command("fw_train.commands.eval", "judge trained weights on held-out clips, side by side"),
    "baseline": Command("fw_train.commands.baseline", "score the best constant prediction on held-out clips"),
    "inspect": Command(
        "fw_train.commands.inspect", "say what weights, checkpoints and runs hold, and if they are whole"
    ),
    "export": Command("fw_train.commands.export", "write trained weights for other programs"),
    "sample": Command("fw_train.commands.sample", "generate a clip with its depth, points and cameras"),
    "doctor": Command("launch.doctor", "check every node, and the network between them, before a run"),
    "plan": Command("fw_train.commands.plan", "say what a run will need: memory, time, disk, network"),
    "config": Command(
        "fw_train.commands.config", "print a configuration with its overrides, or all settings there are"
    ),
    "report": Command("fw_train.commands.report", "write what runs have learnt into one HTML page"),
    "params": Command("fw_train.commands.params", "count the network's parameters and what trains in the stage"),
    "parity": Command("fw_train.commands.parity", "compare a module with stored reference activations"),
    "data": Group(
        "make, pack and check training data",
        {
            "synth": Command("data_tools.synth", "make synthetic scenes with exact depth, points and cameras"),
            "convert": Command(
                "data_tools.convert", "bring clips, cameras and labels of other tools into a raw folder"
            ),
            "pack": Command("data_tools.pack", "pack a raw folder into WebDataset tars"),
            "encode": Command("data_tools.encode", "encode videos and captions once, in tars beside the shards"),
            "verify": Command("data_tools.verify", "check every byte of a packed dataset"),
            "info": Command("data_tools.info", "describe a packed dataset"),
            "preview": Command("data_tools.preview", "draw a sample of a packed dataset as a PNG"),
            "audit": Command("data_tools.audit", "name what is wrong with a packed dataset's labels, with pictures"),
        },
    ),
    "bench": Group(
        "measure speed, memory and FLOPs",
        {
            "model": Command("fw_train.commands.bench_model", "the network: forward, backward, peak memory, MFU"),
            "train": Command(
                "fw_train.commands.bench_train", "training: parts of a step, memory, saves, the loop's cost"
            ),
            "data": Command("data_tools.bench_data", "the loader: samples a second, where the time goes, memory"),
        },
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fw", description="Train FantasyWorld-style models.")
    parser.add_argument("--version", action="version", version=f"fw_train {fw_train.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, entry in COMMANDS.items():
        if isinstance(entry, Group):
            group = subparsers.add_parser(name, help=entry.help, description=entry.help)
            inner = group.add_subparsers(metavar="WHAT", required=True)
            for inner_name, command in entry.commands.items():
                _add(inner, [name, inner_name], command, arguments)
        else:
            _add(subparsers, [name], entry, arguments)
    args, rest = parser.parse_known_args(arguments)
    # argparse takes `section.key=value` only right behind CONFIG; behind an option they land here.
    strays = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(args, "overrides")]
    if strays:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    if rest:
        args.overrides += rest
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{args.name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("FW_TRACEBACK"):
            raise
        print(f"{args.name}: {error}", file=sys.stderr)
        return 1


def _add(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]",
    words: list[str],
    command: Command,
    arguments: list[str],
) -> None:
    """Only the command that is asked for is imported: `fw --help` stays instant."""
    parser = subparsers.add_parser(
        words[-1],
        help=command.help,
        description=command.help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if arguments[: len(words)] == words:
        module = importlib.import_module(command.module)
        parser.description = module.__doc__
        module.add_arguments(parser)
        parser.set_defaults(run=module.run, name=" ".join(["fw", *words]))


if __name__ == "__main__":
    sys.exit(main())
