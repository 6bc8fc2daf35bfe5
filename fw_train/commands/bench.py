"""Measure speed, memory and FLOPs; timings are medians of alternating runs, so that ratios hold on a noisy machine."""

import argparse

from fw_train.commands import bench_model

BENCHES = {"model": bench_model}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="bench", metavar="WHAT", required=True)
    for name, module in BENCHES.items():
        doc = module.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=doc.splitlines()[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run_bench=module.run)


def run(args: argparse.Namespace) -> int:
    return args.run_bench(args)
