"""What a launch is: written once by the launcher, read by the keeper of each rank, so that no argument meets a shell."""

import json
from pathlib import Path
from typing import NamedTuple


class Launch(NamedTuple):
    id: str  # this launch alone has it; its processes carry it in FW_LAUNCH
    arguments: tuple[str, ...]  # of fw_train.train: the configuration file and what changes it
    output: str  # the run's folder
    before: str | None  # the token of the start that had the folder last: what it left is not this launch's


def log_file(output: Path, rank: int) -> Path:
    """What a rank prints, launch after launch."""
    return output / "logs" / f"rank-{rank:05}.log"


def write_launch(path: Path, launch: Launch) -> None:
    path.write_text(json.dumps(launch._asdict(), indent=1) + "\n")


def read_launch(path: Path) -> Launch:
    tree = json.loads(path.read_text())
    return Launch(tree["id"], tuple(tree["arguments"]), tree["output"], tree["before"])
