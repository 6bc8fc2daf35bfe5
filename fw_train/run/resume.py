"""What must be the same for a run to go on: configuration, base weights, data."""

from collections.abc import Collection, Mapping
from typing import Any

from fw_train.checkpoint.run_state import RunState
from fw_train.config import Config, ConfigError, to_tree
from fw_train.data.encodings import Encodings, conflicts
from fw_train.data.loader import TrainingData
from fw_train.run.allowed_changes import compare_configs

DATA_FIELD = "data.sources"
ENCODINGS = "encodings"  # in the facts of a checkpoint, beside those of the loader


def check_configuration(saved: RunState, config: Config, allowed: Collection[str], base: str) -> None:
    """Refuses what would change the numbers; all reasons in one error."""
    problems = compare_configs(saved.config, to_tree(config), allowed)
    if saved.base_hash != base:
        problems.append(
            f"weights.base is {_short(base)} now and was {_short(saved.base_hash)}: give the base that the run began with"
        )
    if config.train.steps < saved.step:
        problems.append(f"train.steps={config.train.steps}, and {saved.step} steps are done already")
    if problems:
        raise ConfigError(
            f"step {saved.step} of {config.run.output} cannot be resumed with this configuration: {'; '.join(problems)}; or begin "
            f"another run with another run.output"
        )


def data_facts(data: TrainingData, encodings: Encodings) -> dict[str, Any]:
    """What a checkpoint keeps of the data, in plain JSON."""
    return {**data.facts, ENCODINGS: encodings}


def check_data(state: RunState, data: TrainingData, encodings: Encodings, allowed: Collection[str]) -> None:
    """Refuses data that would give other samples in another order, and another VAE where latents are encoded online."""
    if DATA_FIELD in allowed:
        return
    before = {**state.data_facts}
    known = before.pop(ENCODINGS, {})  # checkpoints of older versions do not have them
    differences = [] if data.fingerprint == state.data_fingerprint else _differences(before, data.facts)
    differences += conflicts(encodings, known).values()
    if differences or data.fingerprint != state.data_fingerprint:
        raise ConfigError(
            f"the data are not those that the run trained on ({'; '.join(differences) or 'their fingerprints differ'}): put them "
            f"back, or pass --allow-change {DATA_FIELD} to go on with another order of other samples"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{prefix}{name}: ")
        elif before != after:
            found.append(f"{prefix}{name} was {before!r:.120} and is {after!r:.120}")
    return found


def _short(base: str) -> str:
    return f"{base[:16]}..." if len(base) == 64 else f"'{base}'"
