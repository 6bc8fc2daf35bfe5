"""Arguments that several commands share."""

import argparse

from fw_train.config import Config, load_config


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, for example configs/stage1.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="changes to it, for example data.frames=41"
    )


def read_config(args: argparse.Namespace) -> Config:
    return load_config(args.config, args.overrides)
