"""Whether all that a run puts together was encoded alike: training data, held-out clips, and the weights that it starts from."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fw_train.conditioning import sidecar_kinds
from fw_train.config import Config, ConfigError
from fw_train.data.encodings import Encodings, conflicts, shared_facts
from fw_train.data.loader import TrainingData
from fw_train.data.sidecar_tensor import LATENT_KINDS, sidecar_facts
from fw_train.encoders.latents import LatentCodec
from fw_train.model.wan import WanParams
from fw_train.weights.files import open_checkpoint
from fw_train.weights.stage import stored_encodings

log = logging.getLogger(__name__)

VALIDATION, BASE, INIT_FROM = "data.validation", "weights.base", "weights.init_from"


def encodings_of(data: TrainingData, wan: WanParams, codec: LatentCodec | None) -> dict[str, dict[str, Any]]:
    """What the network is trained on; latents encoded online count as those that `fw data encode` makes with the same VAE."""
    found = {kind: dict(facts) for kind, facts in data.encodings.items()}
    if codec is not None:
        for kind in set(sidecar_kinds(wan, online=False)) - set(sidecar_kinds(wan, online=True)):
            found[kind] = shared_facts(sidecar_facts(kind, codec.fingerprint_facts))
    return found


def encodings_of_weights(config: Config) -> dict[str, Encodings]:
    """What the weights that the run starts from were trained on, by setting; those of others, and older ones, do not say."""
    paths = {BASE: config.weights.base, INIT_FROM: config.weights.init_from}
    stored = {setting: stored_encodings(open_checkpoint(path)) for setting, path in paths.items() if path}
    return {setting: encodings for setting, encodings in stored.items() if encodings is not None}


def check_encodings(
    config: Config, ours: Encodings, others: Mapping[str, Encodings | None], allowed: Collection[str]
) -> None:
    """Refuses what `encoding_problems` finds; all of it in one error."""
    problems = list(encoding_problems(config, ours, others, allowed))
    if problems:
        raise ConfigError("; ".join(problems))


def encoding_problems(
    config: Config, ours: Encodings, others: Mapping[str, Encodings | None], allowed: Collection[str]
) -> Iterator[str]:
    """What was not encoded like the training data; `others` are the encodings of settings, None where they are not known."""
    paths = {VALIDATION: config.data.validation, BASE: config.weights.base, INIT_FROM: config.weights.init_from}
    for setting, encodings in others.items():
        found = conflicts(ours, encodings or {})
        if not found:
            continue
        what = "was not encoded like data.sources" if setting == VALIDATION else "was trained on data encoded otherwise"
        told = f"{setting}={paths[setting]} {what} ({'; '.join(found.values())})"
        if setting in allowed:
            log.warning("%s; allowed by --allow-change", told)
        else:
            yield f"{told}; {_remedy(config, setting, list(found))}, or pass --allow-change {setting} to go on all the same"


def _remedy(config: Config, setting: str, kinds: Sequence[str]) -> str:
    """How the kinds come to be alike."""
    online = config.data.latents == "online"
    encoded = ",".join(kind for kind in kinds if not (online and kind in LATENT_KINDS))
    if setting == VALIDATION:
        command = f"fw data encode {config.data.validation} --members {encoded} --replace"
        return f"encode it again with the encoder of the sources, with `{command}`"
    command = f"fw data encode DATA --members {encoded} --replace"
    steps = [f"encode the data again with the encoder of those weights, with `{command}`"] if encoded else []
    if online and not set(kinds).isdisjoint(LATENT_KINDS):
        steps.append("give the VAE of those weights as data.vae")
    return f"{' and '.join(steps)}, or give weights that were trained on data like these"
