"""`fw`: one command for all tools. Exit codes: 0 fine, 1 a check failed or an input cannot be used, 2 wrong usage."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

import fw_train

# Command -> (module with `add_arguments(parser)` and `run(args) -> int`, what it does). Modules load only when called.
COMMANDS = {
    "params": ("fw_train.commands.params", "count the network's parameters and what trains in the stage"),
    "parity": ("fw_train.commands.parity", "compare a module with stored reference activations"),
    "bench": ("fw_train.commands.bench", "measure speed, memory and FLOPs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fw", description="Train FantasyWorld-style models.")
    parser.add_argument("--version", action="version", version=f"fw_train {fw_train.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only the command that is asked for is imported: `fw --help` stays instant.
    for name, (module, help_text) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=help_text, description=help_text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if arguments[:1] == [name]:
            command = importlib.import_module(module)
            subparser.description = command.__doc__
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
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
    except (ValueError, OSError) as error:
        if os.environ.get("FW_TRACEBACK"):
            raise
        print(f"fw {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
