"""What a run's folder says about it: its stage, how it ended, and its figures by step."""

from pathlib import Path
from typing import Any, NamedTuple

from fw_train.config import Config, load_config
from fw_train.inference import CONFIG_NAME
from fw_train.monitoring.metrics_file import read_lines
from fw_train.monitoring.monitor import METRICS
from fw_train.run.folder import Status, read_status


class Curve(NamedTuple):
    """A figure by step; both lists are of one length."""

    steps: list[int]
    values: list[float]


class History(NamedTuple):
    folder: Path
    config: Config
    config_text: str
    status: Status | None  # None: it never started
    code: str
    trained: dict[str, Curve]  # by the names of metrics.jsonl, means between logged steps
    validated: dict[str, Curve]

    @property
    def stage(self) -> str:
        return self.config.train.stage

    @property
    def weights(self) -> Path | None:
        """The last step's trained weights."""
        found = sorted(self.folder.glob("step-*.safetensors"), key=lambda path: int(path.stem.removeprefix("step-")))
        return found[-1] if found else None


def read_history(folder: Path) -> History:
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise ValueError(f"no {config}: {folder} is not the folder of a run; give those that `fw train` wrote")
    metrics = folder / METRICS
    lines = read_lines(metrics) if metrics.is_file() else []
    return History(
        folder=folder,
        config=load_config(config),
        config_text=config.read_text(encoding="utf-8"),
        status=read_status(folder),
        code=next((str(line["code_version"]) for line in reversed(lines) if line.get("kind") == "run"), ""),
        trained=_curves(lines, "step"),
        validated=_curves(lines, "validation"),
    )


def _curves(lines: list[dict[str, Any]], kind: str) -> dict[str, Curve]:
    """Every number by its name; of a step that was done twice the later one."""
    by_step = {int(line["step"]): line for line in lines if line.get("kind") == kind}
    curves: dict[str, Curve] = {}
    for step, line in sorted(by_step.items()):
        for name, value in line.items():
            if name in ("step", "time") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            curve = curves.setdefault(name, Curve([], []))
            curve.steps.append(step)
            curve.values.append(float(value))
    return curves
