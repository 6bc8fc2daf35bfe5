"""Which checkpoints stay, and removing the others so that a kill in between leaves whole checkpoints alone."""

import logging
import os
import secrets
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from fw_train.atomic_files import sync
from fw_train.checkpoint.layout import TRASH, Checkpoint, scan, weights_name

log = logging.getLogger(__name__)


def plan_retention(
    steps: Sequence[int], keep_last: int, keep_every: int = 0, protected: Collection[int] = ()
) -> set[int]:
    """The steps to remove, of `steps` with the latest save first; the first one always stays.

    Kept are the `keep_last` latest, every multiple of `keep_every` (0: none) and the protected ones.
    """
    kept = set(steps[: max(1, keep_last)]) | set(protected)
    return {step for step in steps if step not in kept and not (keep_every and step % keep_every == 0)}


def remove_superseded(
    folder: Path, keep_last: int, keep_every: int = 0, protected: Collection[int] = ()
) -> list[Checkpoint]:
    """Removes what `plan_retention` gives up, with its `step-N.safetensors`; only checkpoints that can be loaded count.

    Damaged ones are left for a person to look at.
    """
    checkpoints = scan(folder).checkpoints
    going = plan_retention([checkpoint.step for checkpoint in checkpoints], keep_last, keep_every, protected)
    removed = [checkpoint for checkpoint in checkpoints if checkpoint.step in going]
    for checkpoint in reversed(removed):
        # The weights go first: were this killed in between, the checkpoint would still be there to be removed again.
        (folder.parent / weights_name(checkpoint.step)).unlink(missing_ok=True)
        discard(checkpoint.path)
    if removed:
        log.info("removed the checkpoints %s", ", ".join(checkpoint.path.name for checkpoint in removed))
    return removed


def discard(path: Path) -> None:
    """Removes a folder that is a checkpoint no more from the moment it begins to go."""
    trash = path.with_name(f"{TRASH}{secrets.token_hex(4)}")
    os.rename(path, trash)
    sync(path.parent)
    shutil.rmtree(trash, ignore_errors=True)
