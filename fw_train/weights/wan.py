"""Pretrained Wan weights into the video transformer, and from there into the geometry branch.

Checkpoints come with the original parameter names, which are ours, or with those of diffusers' `WanTransformer3DModel`.
"""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fw_train.model.wan import VARIANTS, WanDiT, WanParams
from fw_train.model.world import FantasyWorldModel
from fw_train.weights.files import CheckpointError, CheckpointReader, TensorInfo, listing, open_checkpoint

log = logging.getLogger(__name__)

Layout = Literal["original", "diffusers"]
Conv = TypeVar("Conv", bound=nn.Conv2d | nn.Conv3d)

PATCH_WEIGHT = "patch_embedding.weight"

# In front of what an export holds beside the video transformer, in either layout; no importer of Wan weights reads it.
GEOMETRY_PREFIX = "geometry."

# Programs that wrap the network leave their mark in front of every name, sometimes several of them.
PREFIXES = ("model.", "module.", "diffusion_model.", "pipe.dit.", "video.")

# Original names to those of diffusers, without `.weight` and `.bias`.
DIFFUSERS_NAMES = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
# The same behind `blocks.N.`.
DIFFUSERS_BLOCK_NAMES = {
    **{f"self_attn.{n}": f"attn1.{n}" for n in ("norm_q", "norm_k")},
    **{f"self_attn.{n}": f"attn1.to_{n}" for n in ("q", "k", "v")},
    "self_attn.o": "attn1.to_out.0",
    **{f"cross_attn.{n}": f"attn2.{n}" for n in ("norm_q", "norm_k")},
    **{f"cross_attn.{n}": f"attn2.to_{n}" for n in ("q", "k", "v")},
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
ORIGINAL_NAMES = {theirs: ours for ours, theirs in DIFFUSERS_NAMES.items()}
ORIGINAL_BLOCK_NAMES = {theirs: ours for ours, theirs in DIFFUSERS_BLOCK_NAMES.items()}

# Published i2v weights in diffusers' format carry this; neither diffusers nor the original network has a place for it.
UNUSED_IN_DIFFUSERS = r"blocks\.\d+\.attn2\.norm_added_q\.weight"


class NameMap(NamedTuple):
    layout: Layout
    prefix: str  # in front of every name in the file
    file_keys: dict[str, str]  # by original name
    ignored: tuple[str, ...]


class LoadReport(NamedTuple):
    path: Path
    layout: Layout
    tensors: int
    parameters: int
    widened_from: int | None  # input channels of the checkpoint, where they are fewer than the network's


class WanFile(NamedTuple):
    """A checkpoint that fits a video transformer, whose tensors have not been read yet."""

    reader: CheckpointReader
    names: NameMap
    wanted: dict[str, TensorInfo]  # by original name

    def tensor(self, name: str) -> Tensor:
        """A tensor in the network's dtype and shape: new input channels are zeros."""
        tensor, info = self.reader.tensor(self.names.file_keys[name]), self.wanted[name]
        if tensor.shape != info.shape:
            tensor = _with_input_channels(tensor, info.shape[1])
        return tensor.to(info.dtype)

    @property
    def widened_from(self) -> int | None:
        channels = self.reader.shapes()[self.names.file_keys[PATCH_WEIGHT]].shape[1]
        return channels if channels != self.wanted[PATCH_WEIGHT].shape[1] else None


def to_diffusers(name: str) -> str:
    """The name that diffusers gives to an original parameter name."""
    renamed = _renamed(name, DIFFUSERS_NAMES, DIFFUSERS_BLOCK_NAMES)
    if renamed is None:
        raise CheckpointError(f"diffusers' WanTransformer3DModel has no counterpart of `{name}`")
    return renamed


def to_original(name: str) -> str:
    """The original name of a parameter of diffusers' WanTransformer3DModel."""
    renamed = _renamed(name, ORIGINAL_NAMES, ORIGINAL_BLOCK_NAMES)
    if renamed is None:
        raise CheckpointError(f"the original Wan network has no counterpart of diffusers' `{name}`")
    return renamed


def map_names(keys: Iterable[str]) -> NameMap:
    """Original names for the keys of a checkpoint in either layout; keys that neither layout has keep their names."""
    keys = list(keys)
    ignored = [key for key in keys if key.startswith(GEOMETRY_PREFIX)]
    keys = [key for key in keys if not key.startswith(GEOMETRY_PREFIX)]
    prefix = _common_prefix(keys)
    names = [key.removeprefix(prefix) for key in keys]
    diffusers = any(name.startswith("condition_embedder.") or ".attn1." in name for name in names)
    file_keys: dict[str, str] = {}
    twice = []
    for key, name in zip(keys, names, strict=True):
        if diffusers:
            if re.fullmatch(UNUSED_IN_DIFFUSERS, name):
                ignored.append(key)
                continue
            name = _renamed(name, ORIGINAL_NAMES, ORIGINAL_BLOCK_NAMES) or name
        if name in file_keys:
            twice.append(f"{file_keys[name]} = {key}")
        file_keys[name] = key
    if twice:
        raise CheckpointError(f"the checkpoint holds the same weights under two names: {listing(twice)}")
    return NameMap("diffusers" if diffusers else "original", prefix, file_keys, tuple(ignored))


def open_wan(model: WanDiT, path: str | Path, widen: bool = False) -> WanFile:
    """A checkpoint for the video transformer, which may be on the meta device; nothing but headers is read.

    Whatever is missing, left over or of another shape is listed in one error, with the settings that fit. With `widen` a
    patch embedding of fewer input channels is accepted; the new channels are zeros.
    """
    reader = open_checkpoint(path)
    shapes = reader.shapes()
    names = map_names(shapes)
    found = {name: shapes[key] for name, key in names.file_keys.items()}
    wanted = {name: TensorInfo.of(parameter) for name, parameter in model.named_parameters()}
    narrow = _is_narrower(found.get(PATCH_WEIGHT), wanted[PATCH_WEIGHT])

    problems = _differences(found, wanted, names, accept_narrow=narrow and widen)
    if problems:
        hints = list(_hints(reader, found, model.params))
        if narrow and not widen:
            hints.append("weights.widen_input=true accepts fewer input channels, with zeros for the new ones")
        raise CheckpointError(
            f"{reader.path} does not fit the {model.params.variant} network: {'; '.join([*problems, *hints])}"
        )
    if names.ignored:
        log.info("%s: not used by the network: %s", reader.path, listing(names.ignored))
    file = WanFile(reader, names, wanted)
    if file.widened_from is not None:
        log.warning(
            "%s: widened from %d to %d input channels; the first %d keep their weights, the others start at zero",
            PATCH_WEIGHT, file.widened_from, wanted[PATCH_WEIGHT].shape[1], file.widened_from,
        )  # fmt: skip
    return file


def load_wan(model: WanDiT, path: str | Path, device: torch.device | str, widen: bool = False) -> LoadReport:
    """Gives the video transformer the weights of a checkpoint (see `open_wan`), tensor by tensor, in its parameters' dtypes."""
    file = open_wan(model, path, widen)
    for name in file.wanted:
        assign_parameter(model, name, file.tensor(name).to(device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tensors, layout = len(file.wanted), file.names.layout
    log.info("%s: %d tensors, %s parameters, %s names", file.reader.path, tensors, f"{parameters:,}", layout)
    return LoadReport(file.reader.path, layout, tensors, parameters, file.widened_from)


def seed_geometry(model: FantasyWorldModel) -> None:
    """Gives every geometry block the weights of its video block, and those of its self-attention to its frame attention too.

    What only geometry blocks have, adapters and gates, is left alone.
    """
    for pair, geo_block in enumerate(model.geo_blocks):
        video_block = model.video.blocks[model.params.split_layer + pair]
        for name, source in video_block.named_parameters():
            targets = [name]
            if name.startswith("self_attn."):
                targets.append(name.replace("self_attn.", "frame_attn.", 1))
            for target in targets:
                _assign_copy(geo_block, target, source)


def assign_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a parameter, which may be on the meta device; `requires_grad` stays as it was."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=owner.get_parameter(leaf).requires_grad))


def widen_input_channels(conv: Conv, in_channels: int) -> Conv:
    """A convolution of more input channels in the dtype and on the device of `conv`: first its weights, then zeros."""
    if conv.groups != 1:
        raise ValueError(f"a convolution of {conv.groups} groups cannot be widened; its inputs are split among them")
    if in_channels < conv.in_channels:
        raise ValueError(f"the convolution has {conv.in_channels} input channels already, more than {in_channels}")
    wide = copy.deepcopy(conv)
    wide.in_channels = in_channels
    weight = _with_input_channels(conv.weight.detach(), in_channels)
    wide.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    return wide


def _with_input_channels(weight: Tensor, channels: int) -> Tensor:
    """weight [O, I, ...] to [O, channels, ...] in its own dtype; a float32 patch of zeros would promote a half one."""
    wide = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
    wide[:, : weight.shape[1]] = weight
    return wide


def _assign_copy(module: nn.Module, name: str, source: Tensor) -> None:
    if source.is_meta:
        raise ValueError(
            "the video blocks have no weights yet; load them before they are copied to the geometry blocks"
        )
    old = module.get_parameter(name)
    device = source.device if old.is_meta else old.device
    assign_parameter(module, name, source.detach().to(device, old.dtype, copy=True))


def _renamed(name: str, names: Mapping[str, str], block_names: Mapping[str, str]) -> str | None:
    match = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name)
    if match is None:
        return None
    block, stem, leaf = match.groups(default="")
    renamed = (block_names if block else names).get(stem)
    return None if renamed is None else f"{block}{renamed}{leaf}"


def _common_prefix(keys: list[str]) -> str:
    """What stands in front of all keys, of the known prefixes."""
    prefix = ""
    while keys:
        longer = [prefix + part for part in PREFIXES if all(key.startswith(prefix + part) for key in keys)]
        if not longer:
            break
        prefix = longer[0]
    return prefix


def _is_narrower(found: TensorInfo | None, wanted: TensorInfo) -> bool:
    if found is None or len(found.shape) != len(wanted.shape):
        return False
    (out, channels, *kernel), (wanted_out, wanted_channels, *wanted_kernel) = found.shape, wanted.shape
    return (out, kernel) == (wanted_out, wanted_kernel) and 0 < channels < wanted_channels


def _differences(
    found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo], names: NameMap, accept_narrow: bool
) -> list[str]:
    shared = [name for name in wanted if name in found]
    shapes = [
        f"{name} {list(found[name].shape)}, expected {list(wanted[name].shape)}"
        for name in shared
        if found[name].shape != wanted[name].shape and not (accept_narrow and name == PATCH_WEIGHT)
    ]
    dtypes = [f"{name} {found[name].dtype}" for name in shared if not found[name].dtype.is_floating_point]
    lists = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [names.file_keys[name] for name in found if name not in wanted],
        "of another shape": shapes,
        "not floating-point": dtypes,
    }
    return [f"{what}: {listing(entries)}" for what, entries in lists.items() if entries]


def _hints(reader: CheckpointReader, found: Mapping[str, TensorInfo], params: WanParams) -> Iterator[str]:
    """What the checkpoint is, where it is not what was configured."""
    stage = reader.metadata.get("stage")
    if stage not in (None, "stage0"):
        yield f"these are the trained weights of {stage}; the base is a Wan checkpoint or the weights of stage0"
    channels = _size(found, PATCH_WEIGHT, 1)
    if channels is None:
        yield "this is not a Wan transformer: it has no patch embedding"
        return
    clip, camera = ("img_emb.proj.1.weight" in found), ("control_adapter.conv.weight" in found)
    evidence = f"{channels} input channels, {'' if clip else 'no '}img_emb, {'' if camera else 'no '}control_adapter"
    fitting = [
        variant
        for variant, inputs in VARIANTS.items()
        if (inputs.in_channels, inputs.clip, inputs.camera_channels > 0) == (channels, clip, camera)
    ]
    if not fitting:
        yield f"no variant has {evidence}"
    elif params.variant not in fitting:
        yield f"this looks like {' or '.join(fitting)} weights ({evidence}); set model.variant={fitting[0]}"

    blocks = [int(match[1]) for name in found if (match := re.match(r"blocks\.(\d{1,6})\.", name))]
    settings = {
        "dim": _size(found, PATCH_WEIGHT, 0),
        "ffn_dim": _size(found, "blocks.0.ffn.0.weight", 0),
        "layers": max(blocks, default=-1) + 1 or None,
        "text_dim": _size(found, "text_embedding.0.weight", 1),
        "clip_dim": _size(found, "img_emb.proj.1.weight", 1),
        "freq_dim": _size(found, "time_embedding.0.weight", 1),
        "reference_conv": "ref_conv.weight" in found,
        "image_position": "img_emb.emb_pos" in found,
    }
    for setting, value in settings.items():
        if value is not None and value != getattr(params, setting):
            yield f"set model.{setting}={str(value).lower()}"


def _size(found: Mapping[str, TensorInfo], name: str, axis: int) -> int | None:
    shape = found[name].shape if name in found else ()
    return shape[axis] if len(shape) > axis else None
