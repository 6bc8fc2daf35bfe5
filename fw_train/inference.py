"""A trained network to ask: the weights of a stage on their base, as the run that trained them was configured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fw_train.atomic_files import replace_file
from fw_train.build import base_identity, initialise, on_meta, trainable_shapes, world_params
from fw_train.config import Config, ConfigError, load_config, to_yaml
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import PRECISIONS, assert_uniform
from fw_train.weights.stage import (
    VIDEO_STAGE,
    StageInfo,
    load_stage_weights,
    read_stage_info,
    validate_stage_weights,
)
from fw_train.weights.wan import load_wan

CONFIG_NAME = "config.yaml"


class Trained(NamedTuple):
    """A network without gradients, in eval mode; after stage 0 its geometry branch is fresh and tells nothing."""

    model: FantasyWorldModel
    config: Config  # of the run, with the stage of the weights
    info: StageInfo


def load_trained(
    checkpoint: str | Path,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str | torch.device = "cpu",
    precision: str | None = None,
) -> Trained:
    """The network of a `step-N.safetensors`, checked against its base; `config` is found in the run's folder.

    Weights are read in the precision that they were trained in and rounded once to `precision` where that differs.
    """
    checkpoint, info = Path(checkpoint), read_stage_info(checkpoint)
    settings = config_of(checkpoint, info, config, overrides)
    dtype = PRECISIONS[settings.train.precision].params
    model = on_meta(lambda: FantasyWorldModel(world_params(settings)), dtype)
    if info.stage != VIDEO_STAGE:
        validate_stage_weights(checkpoint, trainable_shapes(model, info.stage), info.stage, base_identity(settings))
    if settings.weights.base:
        load_wan(model.video, settings.weights.base, device, settings.weights.widen_input)
    if info.stage != VIDEO_STAGE:
        load_stage_weights(model, checkpoint, device)
    initialise(model, device, settings.train.seed)
    assert_uniform(model, dtype)
    model.to(PRECISIONS[precision].params if precision else dtype).requires_grad_(False).eval()
    return Trained(model, settings, info)


def config_of(
    checkpoint: Path, info: StageInfo, config: str | Path | None = None, overrides: Sequence[str] = ()
) -> Config:
    """The configuration of the run that wrote a file of stage weights, or the given one, for the stage of the weights."""
    path = Path(config) if config else checkpoint.parent / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"no {path}: say how {checkpoint.name} was trained with --config FILE")
    path_text = json.dumps(str(checkpoint))  # quoted: a path may hold what means something in YAML
    if info.stage == VIDEO_STAGE:
        of_stage = [f"weights.base={path_text}", "weights.init_from="]
    else:
        of_stage = [f"weights.init_from={path_text if info.stage == 'stage2' else ''}"]
    return load_config(path, [*overrides, f"train.stage={info.stage}", *of_stage])


def write_config(folder: Path, config: Config) -> None:
    """Leaves the configuration of a run where `load_trained` finds it."""
    replace_file(folder / CONFIG_NAME, to_yaml(config).encode())
