"""The configuration of a run: frozen dataclasses, strict YAML, dotted overrides, and checks that name the remedy.

    config = load_config("configs/stage1.yaml", ["train.micro_batch=2", "data.frames=41"])

Sizes are (height, width) in pixels; frames are pixel frames.
"""

import dataclasses
import difflib
import hashlib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 8


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, where and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the network; the defaults are Wan2.1-Fun-V1.1-1.3B-Control-Camera."""

    variant: Literal["t2v", "i2v", "inpaint", "control", "camera"] = "camera"
    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    text_dim: int = 4096
    clip_dim: int = 1280
    freq_dim: int = 256  # width of the sinusoidal time embedding
    reference_conv: bool = False  # the checkpoint has `ref_conv` (V1.1 control models)
    image_position: bool = False  # the checkpoint has `img_emb.emb_pos` (first-and-last-frame model)
    split_layer: int = 12  # blocks before the geometry branch splits off
    bridge_heads: int = 8
    bridge_layers: int = 2
    register_tokens: int = 4
    cross_width: int = 1152  # of the cross-attention between the branches
    cross_heads: int = 12
    taps: tuple[int, int, int, int] = (5, 8, 11, 17)  # geometry blocks that the dense heads read, coarsest first
    head_features: int = 256
    head_channels: tuple[int, int, int, int] = (256, 512, 768, 768)  # of the taps, finest first
    head_chunk_frames: int = 3  # latent frames that a dense head computes at once; fewer need less memory


@dataclass(frozen=True)
class WeightsConfig:
    """Where weights come from; an empty path means fresh ones."""

    base: str = (
        ""  # Wan checkpoint: file, folder or index, original or diffusers format; or a stage-0 step-N.safetensors
    )
    widen_input: bool = False  # accept a base whose patch embedding has fewer input channels, widened with zeros
    init_from: str = ""  # the stage-1 step-N.safetensors that stage 2 starts from


@dataclass(frozen=True)
class DataConfig:
    frames: int = 81
    sizes_px: tuple[tuple[int, int], ...] = ((336, 592),)


@dataclass(frozen=True)
class TrainConfig:
    stage: Literal["stage0", "stage1", "stage2"] = "stage1"
    steps: int = 20_000  # optimiser steps
    global_batch: int = 64  # samples per optimiser step, over all GPUs
    micro_batch: int = 1  # samples per GPU and forward pass
    learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    gate_lr_scale: float = 1.0  # learning rate of the zero-initialised gates, relative to the rest
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    seed: int = 0
    camera_drop: float = 0.17  # probability that a sample is trained without its camera
    text_drop: float = 0.1  # probability that a sample is trained with the empty prompt
    diffusion_every_steps: int = 50  # stage 1: how often the (gradient-free) diffusion loss is computed for the log
    save_every_steps: int = 1_000


@dataclass(frozen=True)
class FlowConfig:
    shift: float = 5.0  # of the noise levels towards pure noise; 1 is uniform


@dataclass(frozen=True)
class LossConfig:
    preset: Literal["guide", "paper"] = "guide"
    depth_weight: float | None = None  # null: the preset's
    point_weight: float | None = None
    camera_weight: float | None = None


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `section.key=value` overrides in order, and checks the result."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no configuration file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {MAX_BYTES}")
    tree = _parse(path.read_text(encoding="utf-8"), str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as `model:` at the top, found {_shown(tree)}")
    for override in overrides:
        _override(tree, override)
    config = from_tree(tree, str(path))
    problems = list(_problems(config))
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return config


def from_tree(tree: Mapping[str, Any], where: str) -> Config:
    """A configuration from nested mappings; keys are checked, values converted, cross-checks left to `load_config`."""
    return _build(Config, tree, where, "")


def to_tree(config: Config) -> dict[str, Any]:
    """Nested plain mappings that `from_tree` reads back and YAML or JSON can write."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_hash(config: Config) -> str:
    """A short fingerprint of every field."""
    return hashlib.sha256(json.dumps(to_tree(config), sort_keys=True).encode()).hexdigest()[:16]


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases (a few of them can blow up to gigabytes), repeated keys and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ConfigError(f"{self._line()}: aliases are not allowed in a configuration; write the value out")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ConfigError(f"{self._line()}: nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if isinstance(name, str) and name in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: `{name}` is given twice; keep one")
            seen.add(name if isinstance(name, str) else id(key))
        return super().construct_mapping(node, deep)

    def _line(self) -> str:
        return f"line {self.peek_event().start_mark.line + 1}"


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not readable as plain YAML: {error}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    names = path.strip().split(".")
    if not separator or len(names) != 2 or not all(names):
        raise ConfigError(f"override `{override}` is not of the form section.key=value, for example data.frames=41")
    section = tree.setdefault(names[0], {})
    if section is None:
        section = tree[names[0]] = {}
    if not isinstance(section, dict):
        raise ConfigError(f"override `{override}`: `{names[0]}` is not a section")
    section[names[1]] = _parse(text, f"override `{override}`") if text.strip() else ""  # `key=` means the empty text


def _build(cls: Any, tree: Any, where: str, prefix: str) -> Any:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: `{prefix.rstrip('.')}` is a section of keys, got {_shown(tree)}")
    hints = get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"{where}: unknown key `{name}`{_nearest(str(key), hints, prefix)}")
        hint = hints[key]
        values[key] = (
            _build(hint, value, where, f"{name}.")
            if dataclasses.is_dataclass(hint)
            else _value(hint, value, f"{where}: `{name}`")
        )
    return cls(**values)


def _nearest(key: str, valid: Mapping[str, Any], prefix: str) -> str:
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{prefix}{close[0]}`?"
    return f"; valid here: {', '.join(prefix + name for name in valid)}"


def _value(hint: Any, value: Any, where: str) -> Any:
    """The value as the field's type, or an error; nothing is rounded or guessed."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is one of {', '.join(map(str, args))}, got {_shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is a list, got {_shown(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} has {len(kinds)} entries, got {len(value)}")
        return tuple(_value(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-5 as text
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is of type {hint.__name__}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return f"{str(value)[:80]!r} ({type(value).__name__})"


def _problems(config: Config) -> Iterator[str]:
    """Every cross-check that fails, with its remedy."""
    yield from _model_problems(config.model)
    yield from _data_problems(config.data)
    yield from _train_problems(config)


def _model_problems(m: ModelConfig) -> Iterator[str]:
    positive = ("dim", "ffn_dim", "heads", "layers", "text_dim", "clip_dim", "freq_dim", "bridge_heads", "bridge_layers",
                "cross_width", "cross_heads", "head_features", "head_chunk_frames")  # fmt: skip
    wrong = [name for name in positive if getattr(m, name) < 1]
    if wrong:
        yield f"model.{', model.'.join(wrong)} must be at least 1"
        return
    for name, width, heads in (("dim", m.dim, m.heads), ("cross_width", m.cross_width, m.cross_heads)):
        if width % heads or (width // heads) % 2 or width // heads < 6:
            yield (
                f"model.{name}={width} over {heads} heads is not an even head width of at least 6; "
                f"use a multiple of {2 * heads}"
            )
    if m.dim % m.bridge_heads or m.dim // m.bridge_heads > 256:
        fits = [h for h in range(1, m.dim + 1) if m.dim % h == 0 and m.dim // h <= 256][:4]
        yield (
            f"model.bridge_heads={m.bridge_heads} does not split dim {m.dim} into heads of at most 256, which the fused "
            f"attention kernels need; use {', '.join(map(str, fits))} or more"
        )
    if m.freq_dim % 2:
        yield f"model.freq_dim={m.freq_dim} must be even"
    if m.head_features % 2:
        yield f"model.head_features={m.head_features} must be even"
    if m.register_tokens < 0:
        yield f"model.register_tokens={m.register_tokens} must not be negative"
    if not 1 <= m.split_layer < m.layers:
        yield f"model.split_layer={m.split_layer} must lie in 1..{m.layers - 1}: blocks before and after it are needed"
        return
    pairs = m.layers - m.split_layer
    if list(m.taps) != sorted(set(m.taps)) or m.taps[0] < 0 or m.taps[-1] != pairs - 1:
        yield (
            f"model.taps={list(m.taps)} must be four ascending geometry blocks of which the last is {pairs - 1} "
            f"(layers - split_layer - 1): what follows the last tap would train on nothing"
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.frames < 1 or data.frames % 4 != 1:
        near = max(1, round((data.frames - 1) / 4) * 4 + 1)
        yield f"data.frames={data.frames} is not 4k + 1, which the VAE's time stride needs; use {near}"
    if not data.sizes_px:
        yield "data.sizes_px is empty; give at least one [height, width]"
    for height, width in data.sizes_px:
        if height < 16 or width < 16 or height % 16 or width % 16:
            near_h, near_w = (max(16, round(v / 16) * 16) for v in (height, width))
            yield f"data.sizes_px {height}x{width} is not divisible by 16; use {near_h}x{near_w}"


def _train_problems(config: Config) -> Iterator[str]:
    t = config.train
    for name in ("steps", "global_batch", "micro_batch", "save_every_steps", "diffusion_every_steps"):
        if getattr(t, name) < 1:
            yield f"train.{name}={getattr(t, name)} must be at least 1"
            return
    if t.global_batch % t.micro_batch:
        fits = [m for m in range(1, t.global_batch + 1) if t.global_batch % m == 0]
        yield f"train.global_batch={t.global_batch} is not divisible by micro_batch={t.micro_batch}; use one of {fits}"
    for name in ("learning_rate", "gate_lr_scale"):
        if not 0 < getattr(t, name) < float("inf"):
            yield f"train.{name}={getattr(t, name)} must be positive and finite"
    if not 0 <= t.warmup_steps <= t.steps:
        yield f"train.warmup_steps={t.warmup_steps} must lie between 0 and train.steps={t.steps}"
    if not 0 <= t.weight_decay < float("inf"):
        yield f"train.weight_decay={t.weight_decay} must be finite and not negative"
    for name in ("camera_drop", "text_drop"):
        if not 0 <= getattr(t, name) <= 1:
            yield f"train.{name}={getattr(t, name)} is a probability; use 0 to 1"
    if not 0 < config.flow.shift < float("inf"):
        yield f"flow.shift={config.flow.shift} must be positive and finite; 1 leaves the noise levels uniform"
    for name in ("depth_weight", "point_weight", "camera_weight"):
        weight = getattr(config.loss, name)
        if weight is not None and not 0 <= weight < float("inf"):
            yield f"loss.{name}={weight} must be finite and not negative"
    if t.stage == "stage2" and not config.weights.init_from:
        yield "weights.init_from is empty: stage 2 starts from stage 1's step-N.safetensors; give its path"
    if t.stage != "stage2" and config.weights.init_from:
        yield f"weights.init_from is for stage 2, and train.stage is {t.stage}; leave it empty"
