"""Whether a configuration may continue a run that was started with another one.

A field counts as changing the numbers unless the table below says otherwise: a field that somebody adds is refused until
somebody has thought about it.
"""

import difflib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from fw_train.config import Config, to_tree

log = logging.getLogger(__name__)

# Fields (or `section.*`) that may change freely, and why.
HARMLESS = {
    "run.*": "says where and when to write, not what to compute",
    "weights.base": "a path; the hash of the base weights is compared by itself",
    "weights.init_from": "read when a run begins, never when it goes on",
    "weights.widen_input": "a permission; the base weights are the same",
    "data.validation": "held-out clips are not trained on",
    "data.workers": "the order of samples does not depend on it",
    "data.prefetch": "the order of samples does not depend on it",
    "data.timeout_s": "ends a run or does not",
    "data.max_substituted": "ends a run or does not",
    "train.diffusion_every_steps": "a figure in the log, without gradient",
    "guard.max_bad_steps": "ends a run or does not",
    "guard.agree_every_steps": "compares, changes nothing",
    "guard.hang_s": "ends a run or does not",
    "guard.first_step_s": "ends a run or does not",
    "guard.collective_s": "ends a run or does not",
}

# The same sums in another order: the run goes on from the same bits and then differs by rounding, as it does on another number
# of GPUs.
ROUNDING = {
    "train.micro_batch": "samples per pass; the global batch is the same",
    "train.activation_checkpointing": "recomputes instead of storing",
    "engine.*": "shards, reduces and offloads differently",
    "model.head_chunk_frames": "frames per convolution call",
}


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any], allow: Collection[str] = ()) -> list[str]:
    """What stands in the way of going on with `new` (as `to_tree` gives it); [] if nothing does.

    `allow` names fields that may change the numbers. A field that the old configuration does not have had its default.
    """
    before, after = flattened(to_tree(Config())) | flattened(old), flattened(new)
    problems = [_unknown(name, after) for name in sorted(allow) if name not in after]
    gone = sorted(name for name in before if name not in after)
    problems += [f"{name}={before[name]!r:.60} is unknown to this version; use the one that saved it" for name in gone]
    for name, value in after.items():
        if _same(name, before[name], value):
            continue
        change = f"{name}: {before[name]!r:.80} in the checkpoint, {value!r:.80} now"
        reason = _free(name, before, after)
        if reason:
            log.info("resuming with %s (%s)", change, reason)
        elif name in allow:
            log.warning("resuming with %s: this changes the numbers, and is allowed by --allow-change", change)
        else:
            problems.append(
                f"{change}; it changes the numbers: put it back, or pass --allow-change {name} if it is meant"
            )
    return problems


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`section.key` -> value."""
    return dict(_leaves(tree, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _free(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Why a field may change without being asked for; '' if it may not."""
    section = name.partition(".")[0] + ".*"
    if name == "train.steps" and before["train.schedule"] == after["train.schedule"] == "constant":
        return "a constant learning rate does not depend on the last step"
    return next((table[key] for table in (HARMLESS, ROUNDING) for key in (name, section) if key in table), "")


def _same(name: str, before: Any, after: Any) -> bool:
    if name == "data.sources":
        return [_source(source) for source in before] == [_source(source) for source in after]
    return type(before) is type(after) and before == after


def _source(source: Mapping[str, Any]) -> tuple[str, Any]:
    """What of a dataset the order depends on: it may have moved, its name and weight may not have changed."""
    return source["name"] or PurePath(source["path"]).name, source["weight"]


def _unknown(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"--allow-change {name}: there is no such field" + (f"; did you mean {close[0]}?" if close else "")
