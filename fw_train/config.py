"""The configuration of a run: frozen dataclasses, strict YAML, dotted overrides, and checks that name the remedy.

    config = load_config("configs/stage1.yaml", ["train.micro_batch=2", "data.frames=41"])

Sizes are (height, width) in pixels; frames are pixel frames.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fw_train.config_reading import ConfigError as ConfigError
from fw_train.config_reading import apply_override, build, read_tree


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the network; the defaults are Wan2.1-Fun-V1.1-1.3B-Control-Camera."""

    variant: Literal["t2v", "i2v", "inpaint", "control", "camera"] = "camera"  # of the Wan checkpoint: what it takes
    dim: int = 1536  # width of both branches
    ffn_dim: int = 8960  # width inside the feed-forward layers
    heads: int = 12  # of the attention in the blocks
    layers: int = 30  # blocks of the video transformer
    text_dim: int = 4096  # width of the text embeddings
    clip_dim: int = 1280  # width of the CLIP features of the first frame
    freq_dim: int = 256  # width of the sinusoidal time embedding
    reference_conv: bool = False  # the checkpoint has `ref_conv` (V1.1 control models)
    image_position: bool = False  # the checkpoint has `img_emb.emb_pos` (first-and-last-frame model)
    split_layer: int = 12  # blocks before the geometry branch splits off
    bridge_heads: int = 8  # attention heads of the latent bridge, each at most 256 wide
    bridge_layers: int = 2  # transformer layers of the latent bridge
    register_tokens: int = 4  # learnt tokens beside the camera token, behind the video tokens
    cross_width: int = 1152  # of the cross-attention between the branches
    cross_heads: int = 12  # of that cross-attention
    taps: tuple[int, int, int, int] = (5, 8, 11, 17)  # geometry blocks that the dense heads read, coarsest first
    head_features: int = 256  # channels in which a dense head joins its taps; even
    head_channels: tuple[int, int, int, int] = (256, 512, 768, 768)  # of the taps, finest first
    head_chunk_frames: int = 3  # latent frames that a dense head computes at once; fewer need less memory


@dataclass(frozen=True)
class WeightsConfig:
    """Where weights come from; an empty path means fresh ones."""

    # Wan checkpoint: file, folder or index, original or diffusers format; or a stage-0 step-N.safetensors
    base: str = ""
    widen_input: bool = False  # accept a base whose patch embedding has fewer input channels, widened with zeros
    init_from: str = ""  # the stage-1 step-N.safetensors that stage 2 starts from


@dataclass(frozen=True)
class SourceConfig:
    """A packed dataset that takes part in the mix."""

    path: str  # the folder that `fw data pack` wrote
    weight: float = 1.0  # its share of the steps, relative to the other datasets'
    name: str = ""  # seeds its order; empty: the folder's name


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is read."""

    sources: tuple[SourceConfig, ...] = ()  # the packed datasets of the mix: [{path: data/train, weight: 1, name: ''}]
    validation: str = ""  # packed dataset of held-out clips; empty: nothing is validated
    frames: int = 81  # of a clip: 4k + 1, the VAE's time stride
    # [height, width] in multiples of 16; a clip is scaled and cropped to the nearest aspect
    sizes_px: tuple[tuple[int, int], ...] = ((336, 592),)
    latents: Literal["sidecar", "online"] = "sidecar"  # encoded before by `fw data encode`, or while training
    vae: str = ""  # for online latents: the Wan folder with the VAE, or `dct`
    text_tokens: int = 512  # texts are padded with zeros to this length
    workers: int = 4  # loader processes per GPU
    prefetch: int = 2  # micro-batches that each of them prepares ahead
    timeout_s: float = 300.0  # a loader process that takes longer ends the run
    max_substituted: float = 1e-3  # share of samples that may be unreadable before the run stops
    random_crop: bool = False  # instead of the centre; this and what follows need online latents
    max_temporal_stride: int = 1  # a clip takes every n-th frame of a longer one, n up to this
    flip: float = 0.0  # probability of a mirrored clip; captions say left and right
    colour_jitter: float = 0.0  # largest relative change of brightness, contrast and saturation, below 1


@dataclass(frozen=True)
class TrainConfig:
    """The stage, its schedule and its numerics."""

    # stage0: the video branch itself; stage1: the geometry branch; stage2: what joins the branches, too
    stage: Literal["stage0", "stage1", "stage2"] = "stage1"
    steps: int = 20_000  # optimiser steps
    global_batch: int = 64  # samples per optimiser step, over all GPUs
    micro_batch: int = 1  # samples per GPU and forward pass
    learning_rate: float = 1e-5  # of AdamW, after the warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate; cosine ends at 0
    warmup_steps: int = 0  # over which the learning rate rises linearly
    weight_decay: float = 1e-2  # of AdamW; gates and tokens have none
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm
    gate_lr_scale: float = 1.0  # learning rate of the zero-initialised gates, relative to the rest
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of parameters and compute; fp16 under FSDP2 alone
    activation_checkpointing: Literal["none", "selective", "full"] = "full"  # what the backward pass computes again
    seed: int = 0  # of fresh weights, the sample order, noise and dropouts
    camera_drop: float = 0.17  # probability that a sample is trained without its camera
    text_drop: float = 0.1  # probability that a sample is trained with the empty prompt
    diffusion_every_steps: int = 50  # stage 1: how often the (gradient-free) diffusion loss is computed for the log


@dataclass(frozen=True)
class FlowConfig:
    """How noise levels are drawn."""

    shift: float = 5.0  # of the noise levels towards pure noise; 1 is uniform


@dataclass(frozen=True)
class LossConfig:
    """The terms of the loss and their weights."""

    preset: Literal["guide", "paper"] = "guide"  # which depth, point and camera losses (docs/concepts.md)
    depth_weight: float | None = None  # null: the preset's
    point_weight: float | None = None  # null: the preset's
    camera_weight: float | None = None  # null: the preset's
    chamfer_points: int = 4096  # of a clip, that the `guide` preset compares; the work grows with the square


@dataclass(frozen=True)
class EngineConfig:
    """Who distributes weights, gradients and optimiser state over the ranks."""

    kind: Literal["deepspeed", "fsdp2"] = "deepspeed"  # DeepSpeed ZeRO or PyTorch's fully_shard
    zero_stage: Literal[0, 1, 2, 3] = 2  # of DeepSpeed
    cpu_offload: bool = False  # optimiser state in host memory


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, and what it writes when."""

    output: str = "outputs/run"  # the folder; all hosts must see the same one
    resume: Literal["latest", "auto", "never"] = "latest"  # auto: a damaged checkpoint gives way to the one before it
    save_every_steps: int = 1_000  # steps from save to save
    save_every_minutes: float = 0.0  # 0: by steps alone
    keep_last: int = 3  # resumable checkpoints that stay
    keep_every_steps: int = 0  # multiples of this are kept for ever; 0: none
    max_unsaved_minutes: float = 120.0  # training goes on so long when checkpoints cannot be written
    log_every_steps: int = 10  # steps from figure to figure
    log_pictures_every: int = 1_000  # steps; 0: never
    validate_every_steps: int = 1_000  # 0: at the end alone
    validation_samples: int = 64  # held-out clips that are judged
    peak_tflops: float = 0.0  # of a GPU, for the MFU; 0: by its name


@dataclass(frozen=True)
class GuardConfig:
    """What ends or skips steps that are not right."""

    max_bad_steps: int = 5  # in a row: not finite, or a spike
    spike_deviations: float = 20.0  # of the loss above its median, in robust standard deviations; 0: no guard
    spike_window: int = 200  # steps that the median is taken over
    agree_every_steps: int = 500  # how often ranks compare their weights; 0: never
    hang_s: float = 60.0  # a rank that does nothing for so long is named, and the run ends
    first_step_s: float = 1_800.0  # the same until the first step is done: start, compilation
    collective_s: float = 1_800.0  # time limit of communication


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `section.key=value` overrides in order, and checks the result."""
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    config = from_tree(tree, str(path))
    problems = list(_problems(config))
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    return config


def from_tree(tree: Mapping[str, Any], where: str) -> Config:
    """A configuration from nested mappings; keys are checked, values converted, cross-checks left to `load_config`."""
    return build(Config, tree, where)


def to_tree(config: Config) -> dict[str, Any]:
    """Nested plain mappings that `from_tree` reads back and YAML or JSON can write."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """The text of a file that `load_config` reads back, every field named."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: Config) -> str:
    """A short fingerprint of every field."""
    return hashlib.sha256(json.dumps(to_tree(config), sort_keys=True).encode()).hexdigest()[:16]


def _problems(config: Config) -> Iterator[str]:
    """Every cross-check that fails, with its remedy."""
    yield from _model_problems(config.model)
    yield from _data_problems(config.data)
    yield from _train_problems(config)
    yield from _engine_problems(config)
    yield from _run_problems(config)


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
    yield from _source_problems(data)
    for height, width in data.sizes_px:
        if height < 16 or width < 16 or height % 16 or width % 16:
            near_h, near_w = (max(16, round(v / 16) * 16) for v in (height, width))
            yield f"data.sizes_px {height}x{width} is not divisible by 16; use {near_h}x{near_w}"


def _source_problems(data: DataConfig) -> Iterator[str]:
    names = [source.name or Path(source.path).name for source in data.sources]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"data.sources has two datasets named {name}, which would get one order; give one of them another `name`"
    for source in data.sources:
        if not source.path:
            yield "data.sources has a dataset without a path; give the folder that `fw data pack` wrote"
        if not 0 <= source.weight < float("inf"):
            yield f"data.sources {source.path}: weight {source.weight} must be finite and not negative"
    if data.latents == "online" and not data.vae:
        yield "data.vae is empty: online latents need the Wan folder with the VAE, or `dct`"
    if data.latents == "sidecar" and data.vae:
        yield "data.vae is for data.latents=online, and latents come from sidecars; leave it empty"
    changed = [name for name in ("random_crop", "flip", "colour_jitter") if getattr(data, name)]
    changed += ["max_temporal_stride"] * (data.max_temporal_stride > 1)
    if data.latents == "sidecar" and changed:
        yield f"data.{changed[0]} changes pictures that were encoded already; use data.latents=online, or leave it out"
    for name, least in (("text_tokens", 1), ("workers", 0), ("prefetch", 1), ("max_temporal_stride", 1)):
        if getattr(data, name) < least:
            yield f"data.{name}={getattr(data, name)} must be at least {least}"
    for name in ("max_substituted", "flip", "colour_jitter"):
        if not 0 <= getattr(data, name) <= 1:
            yield f"data.{name}={getattr(data, name)} must lie between 0 and 1"
    if not data.timeout_s > 0:
        yield f"data.timeout_s={data.timeout_s} must be positive"


def _engine_problems(config: Config) -> Iterator[str]:
    engine, precision = config.engine, config.train.precision
    if engine.kind == "deepspeed" and precision == "fp16":
        yield "train.precision=fp16 runs under engine.kind=fsdp2 alone; bf16 needs no loss scaling and runs under both"
    if engine.kind == "deepspeed" and engine.zero_stage == 0 and precision == "bf16":
        yield "engine.zero_stage=0 cannot accumulate bf16 gradients in fp32; use 1, 2 or 3"


def _run_problems(config: Config) -> Iterator[str]:
    run, guard = config.run, config.guard
    if not run.output:
        yield "run.output is empty; give the folder of the run"
    counts = {
        "run": ("save_every_steps", "keep_last", "log_every_steps", "validation_samples"),
        "guard": ("max_bad_steps", "spike_window"),
    }
    for section, names in counts.items():
        for name in names:
            if getattr(getattr(config, section), name) < 1:
                yield f"{section}.{name}={getattr(getattr(config, section), name)} must be at least 1"
    for name in (
        "save_every_minutes",
        "keep_every_steps",
        "max_unsaved_minutes",
        "log_pictures_every",
        "validate_every_steps",
        "peak_tflops",
    ):
        if not 0 <= getattr(run, name) < float("inf"):
            yield f"run.{name}={getattr(run, name)} must be finite and not negative"
    if guard.agree_every_steps < 0 or not 0 <= guard.spike_deviations < float("inf"):
        yield "guard.agree_every_steps and guard.spike_deviations must not be negative; 0 turns them off"
    for name in ("hang_s", "first_step_s", "collective_s"):
        if not 0 < getattr(guard, name) < float("inf"):
            yield f"guard.{name}={getattr(guard, name)} must be positive and finite"


def _train_problems(config: Config) -> Iterator[str]:
    t = config.train
    for name in ("steps", "global_batch", "micro_batch", "diffusion_every_steps"):
        if getattr(t, name) < 1:
            yield f"train.{name}={getattr(t, name)} must be at least 1"
            return
    if t.global_batch % t.micro_batch:
        fits = [m for m in range(1, t.global_batch + 1) if t.global_batch % m == 0]
        yield f"train.global_batch={t.global_batch} is not divisible by micro_batch={t.micro_batch}; use one of {fits}"
    for name in ("learning_rate", "gate_lr_scale", "max_grad_norm"):
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
    if config.loss.chamfer_points < 1:
        yield f"loss.chamfer_points={config.loss.chamfer_points} must be at least 1"
    for name in ("depth_weight", "point_weight", "camera_weight"):
        weight = getattr(config.loss, name)
        if weight is not None and not 0 <= weight < float("inf"):
            yield f"loss.{name}={weight} must be finite and not negative"
    if t.stage == "stage2" and not config.weights.init_from:
        yield "weights.init_from is empty: stage 2 starts from stage 1's step-N.safetensors; give its path"
    if t.stage != "stage2" and config.weights.init_from:
        yield f"weights.init_from is for stage 2, and train.stage is {t.stage}; leave it empty"
