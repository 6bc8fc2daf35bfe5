"""What a run will need before any machine is asked for: memory of a GPU, time, disk, network, and what else would fit.

    fw plan configs/stage1.yaml --gpus 64 --device h20
    fw plan configs/stage2.yaml --gpus 112 --device h20 --mfu 0.35 --json plan.json
    fw plan configs/stage1.yaml --gpus 64 --device h20 --bench figures.json

Memory comes from taking the step without storage, so no GPU is needed. Time is model FLOPs over the peak times the MFU:
a guess until `--bench` brings what `fw bench train ... --json FILE` measured on such a GPU.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fw_train.activation_checkpointing import MODES
from fw_train.arguments import add_config, read_config
from fw_train.config import Config
from fw_train.devices import DEVICES, device
from fw_train.plan.estimate import DEFAULT_MFU, NODE_GPUS, Plan, make_plan

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--gpus", type=int, required=True, help="GPUs over all nodes, 8 to a node")
    parser.add_argument("--device", default="h20", help=f"one of {', '.join(map(str.lower, DEVICES))} (default h20)")
    parser.add_argument("--mfu", type=float, help=f"model FLOPs utilisation, 0 to 1 (default {DEFAULT_MFU}, a guess)")
    parser.add_argument("--bench", metavar="FILE", type=Path, help="take the MFU from `fw bench train --json FILE`")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the plan there too")


def run(args: argparse.Namespace) -> int:
    """1 where the run does not fit."""
    config = read_config(args)
    if args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus} must be at least 1")
    if args.mfu is not None and args.bench:
        raise ValueError("--mfu and --bench both say how fast the GPUs are; leave one out")
    mfu, source = (args.mfu, "given") if args.mfu is not None else (DEFAULT_MFU, "assumed")
    if args.bench:
        mfu, source = measured_mfu(args.bench, config, args.device), f"measured, {args.bench}"
    if not 0 < mfu <= 1:
        raise ValueError(f"an MFU of {mfu:g} is not between 0 and 1")
    plan = make_plan(config, args.gpus, args.device, mfu, source)
    print("\n".join(lines(config, plan)))
    if args.json:
        args.json.write_text(json.dumps(as_tree(plan), indent=1) + "\n")
    return 0 if plan.fits else 1


def measured_mfu(path: Path, config: Config, name: str) -> float:
    """Of the configured engine, from the figures of a benchmark on a GPU."""
    try:
        figures = json.loads(path.read_text())["figures"]
        mfu = figures[config.engine.kind]["mfu"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} has no figures of the engine {config.engine.kind}; write it with `fw bench train CONFIG --json {path}`"
        ) from None
    if mfu is None:
        raise ValueError(
            f"{path} was measured where the peak is not known; run the benchmark on a GPU, or with "
            f"run.peak_tflops={device(name).bf16_tflops:g}"
        )
    return float(mfu)


def lines(config: Config, plan: Plan) -> Iterator[str]:
    """The plan as text."""
    yield from _head(config, plan)
    yield ""
    yield from _memory(config, plan)
    yield ""
    yield from _time(config, plan)
    yield ""
    yield from _disk(config, plan)
    yield ""
    yield from _what_if(plan)


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<20}{value:>14}  {note}".rstrip()


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _head(config: Config, plan: Plan) -> Iterator[str]:
    train, data, chosen = config.train, config.data, device(plan.device)
    sizes = ", ".join(f"{height}x{width}" for height, width in data.sizes_px)
    engine = f"{config.engine.kind} ZeRO-{config.engine.zero_stage}" if config.engine.kind == "deepspeed" else "fsdp2"
    yield (
        f"{train.stage}, {config.model.variant}, width {config.model.dim} x {config.model.layers} blocks, "
        f"{data.frames} frames of {sizes}, {train.precision}, {engine}"
    )
    yield (
        f"{plan.gpus} x {plan.device}, {chosen.bf16_tflops:g} TFLOP/s and {chosen.memory_gb:g} GB each; global batch "
        f"{train.global_batch} = {plan.gpus} GPUs x micro-batch {train.micro_batch} x {plan.speed.accumulate} accumulated"
    )


def _memory(config: Config, plan: Plan) -> Iterator[str]:
    engine, step = plan.memory.engine, plan.memory.step
    yield "memory of a GPU"
    yield _row(
        "weights", _gib(engine.weights), f"{plan.trainable:,} of {plan.trainable + plan.frozen:,} parameters train"
    )
    yield _row("optimiser", _gib(engine.optimiser), "fp32 masters and two moments, this GPU's part")
    yield _row("gradients", _gib(engine.gradients), "fp32")
    yield _row("buckets", _gib(engine.buckets), "gathered or reduced at once")
    yield _row("inputs", _gib(step.inputs), "what the losses keep of the batch")
    mode = config.train.activation_checkpointing
    yield _row("blocks", _gib(step.blocks), f"kept for the backward pass, activation_checkpointing={mode}")
    yield _row("heads, losses", _gib(step.heads), "kept for the backward pass")
    yield _row("working", _gib(step.working), "at the peak, beyond what is kept")
    share = plan.memory.total / plan.usable_bytes
    yield _row("together", _gib(plan.memory.total), f"{share:.0%} of the {_gib(plan.usable_bytes)} that can be used")
    if not plan.fits:
        yield f"  WARNING: this does not fit; what would: {' or '.join(plan.remedies) or 'nothing that was tried'}"


def _time(config: Config, plan: Plan) -> Iterator[str]:
    speed, gb = plan.speed, plan.speed.traffic_bytes / 1e9
    recomputed = speed.executed_flops / speed.model_flops
    yield f"time at an MFU of {plan.mfu:.1%} ({plan.mfu_source})"
    yield _row("FLOPs of a step", f"{speed.model_flops / 1e15:.1f} PF", f"the model's; {recomputed:.2f}x are executed")
    yield _row("a step", f"{speed.step_s:.2f} s")
    yield _row("the run", f"{speed.hours:.1f} h", f"{config.train.steps:,} steps, {speed.gpu_hours:,.0f} GPU-hours")
    yield _row("network", f"{gb:.2f} GB", f"sent by each GPU in a step, {gb / speed.step_s:.2f} GB/s")


def _disk(config: Config, plan: Plan) -> Iterator[str]:
    disk, data, run = plan.disk, plan.data, config.run
    policy = f"keep_last={run.keep_last}, keep_every_steps={run.keep_every_steps}"
    where = f"{data.samples:,} samples of {data.source}" if data.samples is not None else data.source
    yield "disk"
    yield _row(
        "a checkpoint", f"{disk.save_bytes / 1e9:.2f} GB", f"of which step-N.safetensors {disk.weights_bytes / 1e9:.2f}"
    )
    yield _row("kept", f"{disk.kept_bytes / 1e9:.2f} GB", f"of {disk.saves} saves; {policy}")
    yield _row("written", f"{disk.month_bytes / 1e12:.2f} TB", "in 30 days at this pace")
    parts = f"labels {data.label_bytes / 1e6:.2f}, video {data.video_bytes / 1e6:.2f}, sidecars {data.sidecar_bytes / 1e6:.2f}"
    yield _row("a sample", f"{data.sample_bytes / 1e6:.2f} MB", f"{parts}; {where}")
    labels = plan.label_bytes_per_s_per_node / 1e6
    rate = f"{plan.read_bytes_per_s_per_node / 1e6:.1f} MB/s"
    yield _row("read by a node", rate, f"{min(plan.gpus, NODE_GPUS)} GPUs; labels {labels:.1f} MB/s of it")


def _what_if(plan: Plan) -> Iterator[str]:
    """A line for each number of GPUs: memory and hours by checkpointing mode."""
    yield f"{'what if: GPUs':<15}{'accumulate':>12}" + "".join(f"{mode:>12} GiB{'hours':>9}" for mode in MODES)
    for gpus in sorted({row.gpus for row in plan.what_if}):
        cells = {row.mode: row for row in plan.what_if if row.gpus == gpus}
        yield f"{gpus:<15}{cells[MODES[0]].speed.accumulate:>12}" + "".join(
            f"{row.memory_bytes / GIB:>15.1f}{' ' if row.fits else '!'}{row.speed.hours:>9.1f}"
            for row in cells.values()
        )
    if not all(row.fits for row in plan.what_if):
        yield "! does not fit"


def as_tree(value: Any) -> Any:
    """Named tuples as mappings, all the way down, as JSON takes them."""
    if hasattr(value, "_asdict"):
        return {name: as_tree(item) for name, item in value._asdict().items()}
    return [as_tree(item) for item in value] if isinstance(value, list | tuple) else value
