"""Print what a configuration comes to with its overrides, every field named and checked; or the reference of all settings.

fw config configs/stage1.yaml train.micro_batch=2 data.frames=41
fw config --reference > docs/configuration.md
"""

import argparse
import sys

from fw_train.config import ConfigError, load_config, to_yaml
from fw_train.config_reference import reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, for example configs/stage1.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="changes to it, for example data.frames=41"
    )
    parser.add_argument("--reference", action="store_true", help="the reference of all settings, as Markdown")


def run(args: argparse.Namespace) -> int:
    if args.reference:
        sys.stdout.write(reference())
    elif args.config is None:
        raise ConfigError("give a configuration, for example configs/stage1.yaml, or --reference")
    else:
        sys.stdout.write(to_yaml(load_config(args.config, args.overrides)))
    return 0
