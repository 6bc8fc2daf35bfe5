"""From parameters to a network whose every tensor exists: nothing is allocated twice, nothing depends on the order of building."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from fw_train.config import Config
from fw_train.model.attention import choose_kernel
from fw_train.model.heads import DenseHeadParams
from fw_train.model.wan import WanParams
from fw_train.model.world import FantasyWorldModel, WorldParams
from fw_train.precision import PRECISIONS, assert_uniform
from fw_train.stages import match_rules, stage_rules
from fw_train.weights.base_hash import base_hash
from fw_train.weights.files import TensorInfo
from fw_train.weights.stage import load_stage_weights, validate_stage_weights
from fw_train.weights.wan import load_wan, seed_geometry

M = TypeVar("M", bound=nn.Module)


def world_params(config: Config) -> WorldParams:
    """The network that a configuration describes."""
    m = config.model
    wan = WanParams(
        variant=m.variant,
        dim=m.dim,
        ffn_dim=m.ffn_dim,
        heads=m.heads,
        layers=m.layers,
        text_dim=m.text_dim,
        clip_dim=m.clip_dim,
        freq_dim=m.freq_dim,
        reference_conv=m.reference_conv,
        image_position=m.image_position,
    )
    return WorldParams(
        wan=wan,
        head=DenseHeadParams(m.dim, m.head_features, m.head_channels, m.head_chunk_frames),
        interaction=config.train.stage == "stage2",
        split_layer=m.split_layer,
        bridge_heads=m.bridge_heads,
        bridge_layers=m.bridge_layers,
        register_tokens=m.register_tokens,
        cross_width=m.cross_width,
        cross_heads=m.cross_heads,
        taps=m.taps,
    )


def load_model(config: Config, device: torch.device | str, identity: str | None = None) -> FantasyWorldModel:
    """The network of a run with all its weights: the base's, those of the stage before, fresh ones for the rest.

    `identity` spares hashing the base where `base_identity` has been asked already.
    Every file is checked against the network before anything is allocated, and every tensor is read into its place once.
    """
    weights, dtype = config.weights, PRECISIONS[config.train.precision].params
    model = on_meta(lambda: FantasyWorldModel(world_params(config)), dtype)
    if weights.init_from:
        expected = trainable_shapes(model, "stage1")
        validate_stage_weights(weights.init_from, expected, "stage1", identity or base_identity(config))
    if weights.base:
        load_wan(model.video, weights.base, device, weights.widen_input)
    if weights.init_from:
        load_stage_weights(model, weights.init_from, device)
    elif weights.base:
        seed_geometry(model)
    initialise(model, device, config.train.seed)
    assert_uniform(model, dtype)
    return model


def base_identity(config: Config) -> str:
    """What the video branch holds: the hash of its checkpoint, or the seed of fresh weights."""
    return base_hash(config.weights.base) if config.weights.base else f"fresh weights of seed {config.train.seed}"


def trainable_shapes(model: FantasyWorldModel, stage: str) -> dict[str, TensorInfo]:
    """Shape and dtype of what a stage trains, and so of what its result file holds."""
    parameters = dict(model.named_parameters())
    matched = match_rules(parameters, stage_rules(stage))
    return {name: TensorInfo.of(p) for name, p in parameters.items() if matched[name].trainable}


def on_meta(build: Callable[[], M], dtype: torch.dtype) -> M:
    """Builds modules directly in `dtype`, without storage."""
    with torch.device("meta"), _default_dtype(dtype):
        return build()


def build_model(
    params: WorldParams, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> FantasyWorldModel:
    """A network with fresh weights in `dtype` on `device`."""
    model = on_meta(lambda: FantasyWorldModel(params), dtype)
    initialise(model, device, seed)
    return model


def initialise(model: nn.Module, device: torch.device | str, seed: int) -> None:
    """Gives storage and fresh values to every module that still has parameters on the meta device; others are left alone.

    Each module draws from its own generator, seeded by its name: the same weights on every rank, whatever else was loaded.
    """
    choose_kernel(torch.device(device))
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if not any(parameter.is_meta for parameter in own):
                continue
            if not all(parameter.is_meta for parameter in own):
                raise ValueError(f"{name} is loaded in part; load all of its parameters or none")
            module.to_empty(device=device, recurse=False)
            torch.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()))
            module.reset_parameters()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
