"""The commands of `fw data` in this process, their errors raised and not printed."""

import argparse


def command(module, *words):
    """What `run` of a command's module returns for these words of its command line."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(word) for word in words]))
