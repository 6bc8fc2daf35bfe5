"""The part of `fw data verify` that checks the list of samples that are not trained on."""

from collections.abc import Collection
from pathlib import Path

from data_tools.problems import Problem, problems_of
from fw_train.data.quarantine import QUARANTINE, WRITTEN, lost_entries, read_quarantine


def verify_quarantine(folder: Path, keys: Collection[str] | None) -> tuple[int, list[Problem]]:
    """How many samples are in quarantine, and the problems of the list; `keys` are the dataset's, None where they are not known."""
    problems: list[Problem] = []
    listed: set[str] = set()
    for name in (QUARANTINE, WRITTEN):
        with problems_of(name, problems):
            found = {entry.key for entry in read_quarantine(folder, name)}
            if name == QUARANTINE:
                listed = found
    if problems:
        return 0, problems
    known = listed if keys is None else listed & set(keys)
    for key in listed - known:
        what = "the dataset has no such sample; correct the key, or take the line out"
        problems.append(Problem(QUARANTINE, key, "", what))
    for entry in lost_entries(folder, keys):
        what = f"its line for {entry.fault} is gone; copy it back from {WRITTEN}, or take it out there too if that is meant"
        problems.append(Problem(QUARANTINE, entry.key, "", what))
    return len(known), problems
