"""Time the network: forward, backward, peak memory, FLOPs and their share of the device's peak.

    fw bench model configs/stage1.yaml
    fw bench model configs/stage2.yaml --modes none,selective,full --compile
    fw bench model configs/demo.yaml --against whole-graph data.frames=41 data.sizes_px='[[96,128]]'
    fw bench model configs/demo.yaml --against diffusers train.stage=stage0 model.dim=384 model.ffn_dim=1536 model.heads=12

Weights and inputs are random. `--against` runs an alternative with the same weights, in turn with ours:
  whole-graph  stage 1 without its shortcuts: both branches, cross-attention through its zero gates, autograd everywhere
  diffusers    the video branch alone, as diffusers.WanTransformer3DModel (needs the `encode` extra)
"""

import argparse
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fw_train.activation_checkpointing import MODES, apply_activation_checkpointing
from fw_train.arguments import add_config, read_config
from fw_train.batch import Batch, Prediction, latent_frames
from fw_train.build import build_model, on_meta, world_params
from fw_train.config import Config
from fw_train.flops import Shape, peak_flops, sample_flops, total_flops
from fw_train.measure import KeptTensors, alternate, keep_freed_memory, peak_bytes, synchronise
from fw_train.model.wan import WanDiT, WanParams
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import PRECISIONS
from fw_train.stages import apply_stage, stage_rules

TEXT_TOKENS, CLIP_TOKENS = 512, 257


class Subject(NamedTuple):
    """Something to be timed: its forward pass gives tensors whose mean square is the loss."""

    model: nn.Module
    forward: Callable[[], list[Tensor]]

    def step(self) -> None:
        loss(self.forward()).backward()
        self.model.zero_grad(set_to_none=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the median counts (default 5)")
    parser.add_argument("--modes", help="activation checkpointing modes to compare, for example none,selective,full")
    parser.add_argument("--compile", action="store_true", help="compile every shard unit with torch.compile")
    parser.add_argument(
        "--against", choices=["whole-graph", "diffusers"], help="an alternative to time in turn with ours"
    )
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS, help=f"default {TEXT_TOKENS}")


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    device = torch.device(args.device)
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; leave the option out")
    modes = (args.modes or config.train.activation_checkpointing).split(",")
    unknown = set(modes) - set(MODES)
    if unknown:
        raise ValueError(f"--modes: no mode {', '.join(unknown)}; there are {', '.join(MODES)}")
    batch = random_batch(config, device, args.text_tokens)
    print(describe(config, device, batch))
    keep_freed_memory()
    if args.against == "diffusers":
        return _against_diffusers(config, batch, device, args.repeats)
    if args.against == "whole-graph":
        return _against_whole_graph(config, batch, device, args.repeats)
    return _modes(config, batch, device, args.repeats, modes, args.compile)


def describe(config: Config, device: torch.device, batch: Batch) -> str:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    height, width = config.data.sizes_px[0]
    return (
        f"{config.train.stage}, {config.model.variant}, width {config.model.dim} x {config.model.layers} blocks, "
        f"{config.data.frames} frames of {height}x{width}, micro-batch {batch.latents.shape[0]}, {config.train.precision}; "
        f"{name}, torch {torch.__version__}"
    )


def random_batch(config: Config, device: torch.device, text_tokens: int) -> Batch:
    """A noisy batch of the configured size with every input that any variant takes."""
    m, size, frames = config.model, config.train.micro_batch, config.data.frames
    height, width = config.data.sizes_px[0]
    generator = torch.Generator().manual_seed(config.train.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator)

    params = world_params(config).wan
    latent, space, inputs = latent_frames(frames), (height // 8, width // 8), params.inputs
    batch = Batch(
        latents=random(16, latent, *space),
        text=random(text_tokens, m.text_dim),
        timestep=torch.rand(size, generator=generator) * 1000,
        clip=random(clip_tokens(config), m.clip_dim) if inputs.clip else None,
        image_latents=random(inputs.image_channels, latent, *space) if inputs.image_channels else None,
        control_latents=random(16, latent, *space) if inputs.control_latents else None,
        reference_latents=random(16, *space) if m.reference_conv else None,
        control_camera=random(inputs.camera_channels, latent, height, width) if inputs.camera_channels else None,
        pose9=random(frames, 9),
    )
    return batch.to(device, PRECISIONS[config.train.precision].params)


def clip_tokens(config: Config) -> int:
    """Two images where the network tells them apart by their position."""
    return CLIP_TOKENS * (2 if config.model.image_position else 1)


def loss(outputs: list[Tensor]) -> Tensor:
    return torch.stack([x.float().square().mean() for x in outputs if x.requires_grad]).sum()


def world_subject(model: FantasyWorldModel, batch: Batch, stage: str) -> Subject:
    """What a training step of the stage computes."""

    def forward() -> list[Tensor]:
        prediction: Prediction = model(batch, velocity=stage != "stage1", geometry=stage != "stage0")
        return [x for x in prediction if x is not None]

    return Subject(model, forward)


def _build(config: Config, device: torch.device) -> FantasyWorldModel:
    model = build_model(world_params(config), PRECISIONS[config.train.precision].params, device, config.train.seed)
    apply_stage(model, stage_rules(config.train.stage))
    return model


def _modes(config: Config, batch: Batch, device: torch.device, repeats: int, modes: list[str], compiled: bool) -> int:
    stage, samples = config.train.stage, config.train.micro_batch
    height, width = config.data.sizes_px[0]
    shape = Shape(config.data.frames, height, width, batch.text.shape[1], clip_tokens(config))
    parts = sample_flops(world_params(config), shape, stage, velocity=stage != "stage1")
    by_hand, counted = total_flops(parts) * samples, counted_flops(config, batch)
    print(
        f"model FLOPs of the step: {by_hand / 1e12:.4g} T by formula, {counted / 1e12:.4g} T counted on the meta device"
    )
    for part in parts:
        print(f"  {part.name:<24}{part.forward / 1e9:>12.3f} G forward{part.backward / 1e9:>12.3f} G backward")
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    print(f"\n{'checkpointing':<16}{'forward':>18}{'whole step':>18}{'above weights':>16}{'TFLOP/s':>10}{'MFU':>8}")
    for mode in modes:
        model = _build(config, device)
        apply_activation_checkpointing(model.shard_units(), mode)  # type: ignore[arg-type]
        if compiled:
            for unit in model.shard_units():
                unit.module.compile()
        subject = world_subject(model, batch, stage)
        try:
            subject.step()
            timing = alternate({"forward": subject.forward, "step": subject.step}, repeats, device)
            memory = peak_bytes(subject.step, device)
        except torch.OutOfMemoryError:
            print(f"{mode:<16}{'out of memory':>18}", flush=True)
            del model, subject
            torch.cuda.empty_cache()
            continue
        rate = by_hand / timing["step"].median_s
        share = f"{rate / peak:.1%}" if peak else "-"
        size = f"{memory / 2**20:,.0f} MiB" if memory is not None else "unknown"
        print(
            f"{mode:<16}{timing['forward']!s:>18}{timing['step']!s:>18}{size:>16}{rate / 1e12:>10.2f}{share:>8}",
            flush=True,
        )
        del model, subject
    return 0


def counted_flops(config: Config, batch: Batch) -> int:
    """PyTorch's own count of one step without recomputation."""
    model = on_meta(lambda: FantasyWorldModel(world_params(config)), batch.latents.dtype)
    apply_stage(model, stage_rules(config.train.stage))
    with FlopCounterMode(display=False) as counter:
        world_subject(model, batch.to("meta"), config.train.stage).step()
    return counter.get_total_flops()


def _against_whole_graph(config: Config, batch: Batch, device: torch.device, repeats: int) -> int:
    if config.train.stage != "stage1":
        raise ValueError(f"--against whole-graph compares stage 1, and train.stage is {config.train.stage}")
    ours = _build(config, device)
    whole = on_meta(lambda: FantasyWorldModel(replace(world_params(config), interaction=True)), batch.latents.dtype)
    whole.load_state_dict(ours.state_dict(), assign=True)
    apply_stage(whole, stage_rules("stage1"))
    tracked = replace(batch, latents=batch.latents.clone().requires_grad_())

    def everything() -> list[Tensor]:
        # The velocity is computed and belongs to the graph; its loss counts for nothing in the geometry's gradients.
        return [x for x in whole(tracked) if x is not None]

    subjects = {"ours": world_subject(ours, batch, "stage1"), "whole graph": Subject(whole, everything)}
    return _compare(subjects, device, repeats)


def _against_diffusers(config: Config, batch: Batch, device: torch.device, repeats: int) -> int:
    if config.train.stage != "stage0":
        raise ValueError(
            "--against diffusers compares the video branch, which trains in stage0; add train.stage=stage0"
        )
    ours = _build(config, device).video
    theirs = diffusers_twin(ours, config.model.clip_dim)
    visual = batch.latents if batch.image_latents is None else torch.cat((batch.latents, batch.image_latents), dim=1)

    def forward() -> list[Tensor]:
        return [
            theirs(
                hidden_states=visual,
                timestep=batch.timestep,
                encoder_hidden_states=batch.text,
                encoder_hidden_states_image=batch.clip,
                return_dict=False,
            )[0]
        ]

    with torch.no_grad():
        a, b = ours(batch), forward()[0].float()
    print(f"largest difference of the outputs: {(a - b).abs().max():.2e}, of values up to {b.abs().max():.2f}")
    subjects = {"ours": Subject(ours, lambda: [ours(batch)]), "diffusers": Subject(theirs, forward)}
    return _compare(subjects, device, repeats)


def diffusers_twin(ours: WanDiT, clip_dim: int) -> nn.Module:
    """diffusers' transformer with a copy of our weights."""
    from diffusers import WanTransformer3DModel

    from fw_train.weights.wan import to_diffusers

    p: WanParams = ours.params
    if p.variant not in ("t2v", "i2v"):
        raise ValueError(f"diffusers has the variants t2v and i2v; model.variant is {p.variant}")
    parameter = next(ours.parameters())
    twin: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=p.heads,
        attention_head_dim=p.head_dim,
        in_channels=p.inputs.in_channels,
        out_channels=p.out_dim,
        text_dim=p.text_dim,
        freq_dim=p.freq_dim,
        ffn_dim=p.ffn_dim,
        num_layers=p.layers,
        eps=p.eps,
        image_dim=clip_dim if p.inputs.clip else None,
        added_kv_proj_dim=p.dim if p.inputs.clip else None,
    )
    twin.to(parameter.device, parameter.dtype)
    twin.load_state_dict({to_diffusers(name): tensor for name, tensor in ours.state_dict().items()})
    return twin


def _compare(subjects: dict[str, Subject], device: torch.device, repeats: int) -> int:
    work = {name: subject.step for name, subject in subjects.items()}
    forwards: dict[str, Callable[[], object]] = {name: subject.forward for name, subject in subjects.items()}
    forward = alternate(forwards, repeats, device)
    step = alternate(work, repeats, device)
    kept = {}
    for name, subject in subjects.items():
        with KeptTensors(subject.model).watch() as tensors:
            outputs = subject.forward()
        kept[name] = tensors.bytes
        del outputs
    synchronise(device)
    print(f"\n{'':<14}{'forward':>20}{'forward + backward':>22}{'kept for backward':>20}")
    for name in subjects:
        print(f"{name:<14}{forward[name]!s:>20}{step[name]!s:>22}{kept[name] / 2**20:>16.1f} MiB")
    ours, other = subjects
    print(
        f"{'ratio':<14}{forward[ours].median_s / forward[other].median_s:>20.3f}"
        f"{step[ours].median_s / step[other].median_s:>22.3f}{kept[ours] / kept[other]:>20.3f}"
    )
    return 0
