"""Trained weights for other programs: in one file or folder with the base, or alone; and an exported network to ask.

    export = plan_export(checkpoint, config, "merged", "diffusers", torch.bfloat16)
    write_export(Path("model"), export, SHARD_BYTES)

Planning reads headers alone. A tensor is read, converted and forgotten when its turn to be written comes.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fw_train.build import base_identity, initialise, on_meta, trainable_shapes, world_params
from fw_train.config import Config, from_tree, to_tree
from fw_train.export.names import diffusers_config, exported_names, network_name
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import assert_uniform
from fw_train.weights.files import CheckpointError, CheckpointReader, TensorInfo, listing, open_checkpoint
from fw_train.weights.stage import (
    DTYPES,
    VIDEO_PREFIX,
    VIDEO_STAGE,
    StageInfo,
    encodings_metadata,
    read_stage_info,
    validate_stage_weights,
)
from fw_train.weights.wan import Layout, assign_parameter, open_wan

FORMAT = "fw_train.export.tensors.v1"
Contents = Literal["merged", "trainable"]
Source = tuple[TensorInfo, Callable[[], Tensor]]  # a tensor that has not been read yet


class ExportedTensor(NamedTuple):
    name: str
    info: TensorInfo
    read: Callable[[], Tensor]

    @property
    def parameters(self) -> int:
        return math.prod(self.info.shape)

    @property
    def bytes(self) -> int:
        return self.info.dtype.itemsize * self.parameters


class Export(NamedTuple):
    """What is to be written."""

    tensors: list[ExportedTensor]
    metadata: dict[str, str]
    layout: Layout
    diffusers_config: dict[str, object] | None  # where diffusers can build a transformer from the tensors


def plan_export(
    checkpoint: Path, config: Config | None, contents: Contents, layout: Layout, dtype: torch.dtype | None = None
) -> Export:
    """The tensors of a `step-N.safetensors` under their exported names, with those of its base where `contents` is merged.

    `config`, of the run that trained the weights, is needed to merge and to describe a network to diffusers. Without `dtype`
    tensors keep the one that they were trained in; the base is rounded to that first, as it was for training.
    """
    info, reader = read_stage_info(checkpoint), open_checkpoint(checkpoint)
    prefix = VIDEO_PREFIX if info.stage == VIDEO_STAGE else ""
    sources: dict[str, Source] = {
        prefix + key: (tensor, partial(reader.tensor, key)) for key, tensor in reader.shapes().items()
    }
    if contents == "merged" and info.stage != VIDEO_STAGE:
        assert config is not None
        sources = {**_base_tensors(checkpoint, config, info), **sources}
    names = exported_names(sources, layout)
    target = info.dtype if dtype is None else dtype
    tensors = [
        ExportedTensor(names[name], TensorInfo(found.shape, target), partial(_converted, names[name], read, target))
        for name, (found, read) in sources.items()
    ]
    metadata = {
        "format": FORMAT,
        "contents": contents,
        "layout": layout,
        "stage": info.stage,
        "step": str(info.step),
        "config_hash": info.config_hash,
        "base_hash": info.base_hash,
        "dtype": next(name for name, known in DTYPES.items() if known == target),
        **encodings_metadata(info.encodings),
    }
    if config is not None:
        metadata["model"] = json.dumps(to_tree(config)["model"], sort_keys=True)
    video = any(name.startswith(VIDEO_PREFIX) for name in sources)
    described = diffusers_config(world_params(config).wan) if config and video and layout == "diffusers" else None
    return Export(tensors, metadata, layout, described)


def load_export(path: str | Path, device: str | torch.device = "cpu") -> FantasyWorldModel:
    """The network of a merged export, without any other file: in eval mode, without gradients, in the dtype of the file.

    What the stage did not train is fresh and takes no part: after stage 0 that is the whole geometry branch.
    """
    reader = open_checkpoint(path)
    facts = _facts(reader)
    dtype, stage = DTYPES[facts["dtype"]], facts["stage"]
    layout: Layout = "diffusers" if facts["layout"] == "diffusers" else "original"
    config = from_tree({"model": json.loads(facts["model"]), "train": {"stage": stage}}, str(reader.path))
    model = on_meta(lambda: FantasyWorldModel(world_params(config)), dtype)
    keys = {network_name(key, layout): key for key in reader.shapes()}
    wanted = _merged_shapes(model, stage)
    problems = {
        "missing": [name for name in wanted if name not in keys],
        "unexpected": [key for name, key in keys.items() if name not in wanted],
        "of another shape or dtype": [
            f"{key} {reader.shapes()[key]}, expected {wanted[name]}"
            for name, key in keys.items()
            if name in wanted and reader.shapes()[key] != wanted[name]
        ],
    }
    if any(problems.values()):
        lists = "; ".join(f"{what}: {listing(entries)}" for what, entries in problems.items() if entries)
        raise CheckpointError(f"{reader.path} is not the network that its metadata describe: {lists}; export it again")
    for name, key in keys.items():
        assign_parameter(model, name, reader.tensor(key).to(device))
    initialise(model, device, config.train.seed)
    assert_uniform(model, dtype)
    return model.requires_grad_(False).eval()


def _base_tensors(checkpoint: Path, config: Config, info: StageInfo) -> dict[str, Source]:
    """The base's tensors as the network holds them, after a look at whether the weights were trained on it."""
    if not config.weights.base:
        raise CheckpointError(
            f"{checkpoint} was trained on {info.base_hash}, which are in no file; use --trainable, or give the base with "
            "weights.base=FILE"
        )
    model = on_meta(lambda: FantasyWorldModel(world_params(config)), info.dtype)
    validate_stage_weights(checkpoint, trainable_shapes(model, info.stage), info.stage, base_identity(config))
    file = open_wan(model.video, config.weights.base, config.weights.widen_input)
    return {VIDEO_PREFIX + name: (tensor, partial(file.tensor, name)) for name, tensor in file.wanted.items()}


def _converted(name: str, read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    tensor = read()
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not converted.isfinite().all() and tensor.isfinite().all():
        raise CheckpointError(
            f"`{name}` reaches {tensor.abs().max():.4g}, more than fp16 can hold; use --dtype bf16 or fp32"
        )
    return converted


def _merged_shapes(model: FantasyWorldModel, stage: str) -> dict[str, TensorInfo]:
    video = {name: TensorInfo.of(p) for name, p in model.named_parameters() if name.startswith(VIDEO_PREFIX)}
    return {**video, **trainable_shapes(model, stage)}


def _facts(reader: CheckpointReader) -> dict[str, str]:
    facts = reader.metadata
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{reader.path} is no export: its metadata has format={facts.get('format')}; for the step-N.safetensors of a "
            "run use fw_train.inference.load_trained"
        )
    if facts.get("contents") != "merged" or "model" not in facts:
        raise CheckpointError(
            f"{reader.path} holds trained weights alone; make a file with all with `fw export --merged`"
        )
    return facts
