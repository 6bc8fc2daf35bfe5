"""What the best constant prediction scores on the held-out clips: the bar that a network has to clear to have learnt anything.

    fw baseline configs/demo.yaml
    fw baseline configs/stage1.yaml --clips 2000 --run outputs/stage1

Every clip gets the same prediction, the mean over the training clips of its size: per-pixel depth and points, and the mean
camera path. It is judged as `fw train` judges the network: the `guide` terms, on the clips of `data.validation`. With --run the
figures of that run's first and last validation stand beside it, with how many times the last one is better than the constant.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from fw_train.arguments import add_config, read_config
from fw_train.build import world_params
from fw_train.commands.promote import read_validations
from fw_train.config import Config, ConfigError
from fw_train.evaluation.constant import constant_for, mean_labels
from fw_train.evaluation.validation import GEOMETRY, Tally
from fw_train.losses import LossParams, sample_losses
from fw_train.monitoring.monitor import METRICS
from fw_train.run.data import BatchMaker, HeldOut


class Row(NamedTuple):
    term: str
    constant: float
    first: float | None
    last: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--clips", type=int, metavar="N", help="average over so many training clips (default: all)")
    parser.add_argument("--run", dest="run_folder", type=Path, metavar="RUN", help="show a run's validation beside it")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    constant = constant_losses(config, args.clips)
    rows = compare(constant, args.run_folder)
    if args.json:
        print(json.dumps([row._asdict() for row in rows]))
        return 0
    print(f"{'':8}{'constant':>10}{'first':>10}{'last':>10}  better than the constant")
    for row in rows:
        first, last = ("-" if value is None else f"{value:.4f}" for value in (row.first, row.last))
        times = "" if row.last is None else f"{row.constant / row.last:.2f}x"
        print(f"{row.term:8}{row.constant:10.4f}{first:>10}{last:>10}  {times}")
    return 0


def constant_losses(config: Config, clips: int | None = None) -> dict[str, float]:
    """The `guide` terms of the constant prediction, means over the held-out clips."""
    if not config.data.validation:
        raise ConfigError("data.validation is empty; give the folder of held-out clips")
    means = mean_labels(
        config, clips, rank=0, world=1, all_sum=lambda tensor: tensor, progress=lambda done, total: None
    )
    wan = world_params(config).wan
    make_batch = BatchMaker(config, wan, torch.device("cpu"))
    tally = Tally()
    for coded, _ in HeldOut(config, wan, rank=0, world=1).batches():
        batch = make_batch(coded)
        losses = sample_losses(constant_for(means, batch), batch, None, LossParams("guide"))
        for term in GEOMETRY:
            tally.add(term, getattr(losses, term).value, getattr(losses, term).counted)
    return tally.means(GEOMETRY, lambda tensor: tensor)


def compare(constant: dict[str, float], run_folder: Path | None) -> list[Row]:
    """The constant's losses beside the first and the last validation of a run."""
    validated = read_validations(run_folder / METRICS) if run_folder else {}
    ends = [validated[step] for step in (min(validated), max(validated))] if validated else [{}, {}]
    names = {term: f"validation/{term}_loss" for term in GEOMETRY}
    return [Row(term, constant[term], *(end.get(names[term]) for end in ends)) for term in GEOMETRY if term in constant]
