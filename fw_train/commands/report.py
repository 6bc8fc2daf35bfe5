"""Write what runs have learnt into one HTML file that any browser opens offline.

    fw report outputs/demo/stage0 outputs/demo/stage1 outputs/demo/stage2 --output outputs/demo/report.html
    fw report outputs/stage1 --eval outputs/eval/eval.json --sample outputs/clip --output report.html

Curves of every run; depth before and after the last one that trained geometry, beside the truth; its points as a cloud to turn;
its cameras; with --eval the best constant prediction beside the losses; with --sample a clip of `fw sample`. A table of the same
figures is printed.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from fw_train.atomic_files import write_file
from fw_train.report.clips import Clip, clips_of, with_validation
from fw_train.report.history import History, read_history
from fw_train.report.page import Report, report_html, summary_rows, table_text
from fw_train.weights.stage import VIDEO_STAGE

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, in the order of the stages")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the HTML file to write")
    parser.add_argument("--eval", type=Path, metavar="FILE", dest="evaluation", help="eval.json, for the constant")
    parser.add_argument("--sample", type=Path, metavar="DIR", help="a folder of `fw sample` to show")
    parser.add_argument("--data", type=Path, metavar="DIR", help="held-out clips (default: those of the run)")
    parser.add_argument("--clips", type=int, default=6, metavar="N", help="held-out clips to draw (default 6)")
    parser.add_argument("--title", default="What the runs have learnt", help="of the page")


def run(args: argparse.Namespace) -> int:
    if args.clips < 0:
        raise ValueError(f"--clips {args.clips} must be at least 0")
    if args.sample and not args.sample.is_dir():
        raise ValueError(f"--sample {args.sample} is no folder; give what `fw sample --output DIR` wrote")
    histories = [read_history(folder) for folder in args.runs]
    constant = _constant(args.evaluation) if args.evaluation else {}
    shown, clips = _clips(histories, args.data, args.clips)
    report = Report(args.title, histories, constant, clips, shown, args.sample)
    write_file(args.output, report_html(report).encode())
    print(table_text(summary_rows(histories, constant)))
    log.info("%s", args.output)
    return 0


def _constant(path: Path) -> dict[str, float]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["constant"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no eval.json; write one with `fw eval CHECKPOINT DATA --output DIR`") from None


def _clips(histories: Sequence[History], data: Path | None, count: int) -> tuple[str, list[Clip]]:
    """Clips as the first run sees them that trained geometry and left weights: there before and after differ most."""
    for history in histories:
        config = with_validation(history.config, data)
        if history.stage != VIDEO_STAGE and history.weights and config.data.validation and count:
            return history.folder.name, list(clips_of(history.weights, config, count))
    return "", []
