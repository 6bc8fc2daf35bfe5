"""Say whether a step of a stage-1 run is ready for stage 2, and why not.

    fw promote outputs/stage1 --step 20000
    fw promote outputs/stage1 && fw train configs/stage2.yaml weights.init_from=outputs/stage1/step-20000.safetensors

The losses on held-out clips must be below the published marks: depth 0.1, points 0.5, cameras 0.05, as the run measured them
with `data.validation` at noise level 0.1, the camera hidden. Without --step the last validated step with saved weights counts.
Exit code 0: ready, and the path of the weights is printed; 1: not ready.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fw_train.monitoring.metrics_file import read_lines
from fw_train.monitoring.monitor import METRICS
from fw_train.weights.stage import read_stage_info

GATES = {"depth": 0.1, "point": 0.5, "camera": 0.05}


class Verdict(NamedTuple):
    step: int
    weights: Path
    reasons: list[str]  # why not; empty: ready


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="the run's folder, for example outputs/stage1")
    parser.add_argument("--step", type=int, metavar="N", help="judge this step (default: the last one that can be)")
    for name, mark in GATES.items():
        parser.add_argument(
            f"--{name}", type=float, default=mark, metavar="X", help=f"mark of the {name} loss (default {mark})"
        )


def run(args: argparse.Namespace) -> int:
    verdict = judge(args.run_folder, args.step, {name: getattr(args, name) for name in GATES})
    if verdict.reasons:
        print(f"step {verdict.step} of {args.run_folder} is not ready for stage 2:", file=sys.stderr)
        for reason in verdict.reasons:
            print(f"  {reason}", file=sys.stderr)
        return 1
    print(verdict.weights)
    return 0


def judge(folder: Path, step: int | None, marks: dict[str, float]) -> Verdict:
    """Compares the validation losses of a step with the marks."""
    validated = read_validations(folder / METRICS)
    if step is None:
        candidates = [number for number in validated if weights_path(folder, number).is_file()]
        if not candidates:
            raise ValueError(
                f"{folder} has no step that was both validated and saved; set data.validation, and let run.validate_every_steps "
                f"be a multiple of run.save_every_steps"
            )
        step = max(candidates)
    weights = weights_path(folder, step)
    if not weights.is_file():
        raise ValueError(f"no {weights}; steps with weights: {_steps_with_weights(folder)}")
    stage = read_stage_info(weights).stage
    if stage != "stage1":
        raise ValueError(f"{weights} holds the weights of {stage}; stage 2 starts from those of stage1")
    if step not in validated:
        raise ValueError(
            f"step {step} was not validated; validated were {sorted(validated)}. Set data.validation and run.validate_every_steps"
        )
    return Verdict(step, weights, list(_reasons(validated[step], marks)))


def read_validations(path: Path) -> dict[int, dict[str, float]]:
    """The validation figures of a run by step; the last ones of a step that was validated twice."""
    if not path.is_file():
        raise ValueError(f"no {path}; give the folder of a run")
    return {line["step"]: line for line in read_lines(path) if line.get("kind") == "validation"}


def weights_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.safetensors"


def _reasons(values: dict[str, float], marks: dict[str, float]) -> Iterator[str]:
    for name, mark in marks.items():
        value = values.get(f"validation/{name}_loss")
        if value is None:
            yield f"the {name} loss was not measured"
        elif not (isinstance(value, int | float) and value < mark):
            yield f"the {name} loss is {value if isinstance(value, str) else f'{value:.4g}'}, and must be below {mark:g}"


def _steps_with_weights(folder: Path) -> str:
    steps = sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))
    return ", ".join(map(str, steps)) or "none"
