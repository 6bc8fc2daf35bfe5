"""Time training: the parts of a step, collectives, memory and a save, by engine; or what our loop costs over a bare one.

    fw bench train configs/stage1.yaml --engines deepspeed,fsdp2
    torchrun --nproc-per-node 8 -m fw_train.cli bench train configs/stage1.yaml --synthetic-batch --json figures.json
    deepspeed --no_local_rank --module fw_train.cli bench train configs/stage2.yaml
    fw bench train configs/demo.yaml --against bare-loop

Weights are random. Engines take turns, each with a fresh model; medians over all turns count. `expand` makes batches of what
the loader gives. The collectives are taken from the profile of one more step, and lie within the parts. The checkpoints
are written beside `run.output`, where those of a run would be, and removed again.
"""

import argparse
import json
import logging
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fw_train import dist
from fw_train.arguments import add_config
from fw_train.code_version import code_version
from fw_train.commands.bench_engine import GRADIENT_BYTES, OPTIMISER_BYTES, PARTS, Turn, one_turn
from fw_train.commands.bench_feed import data_feed, synthetic_feed
from fw_train.commands.bench_loop import LoopFigures, Ratio, compare_loops
from fw_train.config import Config, load_config
from fw_train.dist import World
from fw_train.monitoring.facts import run_facts

MIB = 1 << 20


class EngineFigures(NamedTuple):
    """Medians over all timed steps of all turns, on rank 0; bytes are of the rank with the most."""

    step_s: float
    step_quartiles_s: tuple[float, float]
    parts_s: dict[str, float]
    reduce_s: float
    gather_s: float
    samples_per_s: float
    tokens_per_s: float
    mfu: float | None  # None: the device's peak is not known
    peak_bytes: int | None  # of network, engine and steps
    optimiser_bytes: int
    gradient_bytes: int
    state_share: float  # of what one rank alone would hold: fp32 masters, two moments and gradients
    first_stall_s: float
    stall_s: float
    beside_s: float
    save_s: float
    checkpoint_bytes: int
    checkpoint_ratio: float  # to the weights in their dtype + fp32 masters + two moments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--engines", help="engines to compare, for example deepspeed,fsdp2 (default: engine.kind)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each engine, or of each loop (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a turn (default 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of an engine before its timed ones (default 2)")
    parser.add_argument("--synthetic-batch", action="store_true", help="one random batch in memory; needs no data")
    parser.add_argument("--against", choices=["bare-loop"], help="our loop and a bare one around the same engine")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")


def run(args: argparse.Namespace) -> int:
    """Ends the process where it succeeds: gloo's threads do not survive the interpreter's shutdown."""
    if args.rounds < 1 or args.steps < 2 or args.warmup < 0 or (args.against and args.rounds < 2):
        raise ValueError(
            f"--rounds {args.rounds} --steps {args.steps} --warmup {args.warmup}: use at least 1 round of 2 steps, "
            "2 rounds with --against, and no negative warm-up"
        )
    with _only_warnings_logged():
        _measure(args)
    return 0


def _measure(args: argparse.Namespace) -> None:
    configs = _configs(args)
    config = next(iter(configs.values()))
    world = dist.start(config.guard.collective_s)
    say: Callable[[str], None] = print if world.rank == 0 else lambda _: None
    say(describe(config, world, synthetic=args.synthetic_batch))
    feed = synthetic_feed(config, world) if args.synthetic_batch else data_feed(config, world)
    figures: dict[str, Any] = {}
    if args.against:
        batch = feed.expand(next(feed.coded))
        for kind, config in configs.items():
            with _shared_folder(config, world) as folder:
                loops = compare_loops(config, world, batch, feed.empty_text, folder, args.rounds, args.steps)
            say(describe_loops(kind, loops))
            figures[kind] = loops
    else:
        turns: dict[str, list[Turn]] = {kind: [] for kind in configs}
        for _ in range(args.rounds):
            for kind, config in configs.items():
                with _shared_folder(config, world) as folder:
                    turns[kind].append(one_turn(config, world, feed, folder, args.steps, args.warmup))
        figures = {kind: engine_figures(configs[kind], world, of_kind) for kind, of_kind in turns.items()}
        say(table(figures))
    if args.json and world.rank == 0:
        head = {"code": code_version(), "config": args.config, "overrides": args.overrides, "ranks": world.size}
        args.json.write_text(json.dumps({**head, "figures": _plain(figures)}, indent=1) + "\n")
    feed.close()
    dist.finish(world)


def describe(config: Config, world: World, *, synthetic: bool) -> str:
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"{platform.machine()} CPU"
    sizes = ", ".join(f"{height}x{width}" for height, width in config.data.sizes_px)
    return (
        f"{config.train.stage}, {config.model.variant}, width {config.model.dim} x {config.model.layers} blocks, "
        f"{config.data.frames} frames of {sizes}, global batch {config.train.global_batch} in micro-batches of "
        f"{config.train.micro_batch}, {config.train.precision}, {'one random batch' if synthetic else 'data'}; "
        f"{world.size} ranks, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {code_version()}"
    )


def engine_figures(config: Config, world: World, turns: Sequence[Turn]) -> EngineFigures:
    steps = [step for turn in turns for step in turn.steps]
    seconds = [step["step"] for step in steps]
    step_s, last = statistics.median(seconds), turns[-1]
    first_quartile, _, third_quartile = statistics.quantiles(seconds, n=4)
    facts = run_facts(config, world, "")
    samples_per_s = config.train.global_batch / step_s
    peak = facts.peak_flops_per_gpu

    def median(pick: Callable[[Turn], float]) -> float:
        return statistics.median(map(pick, turns))

    return EngineFigures(
        step_s=step_s,
        step_quartiles_s=(first_quartile, third_quartile),
        parts_s={part: statistics.median(step.get(part, 0.0) for step in steps) for part in PARTS},
        reduce_s=median(lambda turn: turn.collectives.reduce_s),
        gather_s=median(lambda turn: turn.collectives.gather_s),
        samples_per_s=samples_per_s,
        tokens_per_s=samples_per_s * facts.tokens_per_sample,
        mfu=facts.flops_per_sample * samples_per_s / (peak * world.size) if peak else None,
        peak_bytes=last.memory,  # on a CPU the first turn's has imports in it
        optimiser_bytes=last.state.optimiser,
        gradient_bytes=last.state.gradients,
        state_share=last.state.total / (last.trainable * (OPTIMISER_BYTES + GRADIENT_BYTES)),
        first_stall_s=median(lambda turn: turn.save.first_stall_s),
        stall_s=median(lambda turn: turn.save.stall_s),
        beside_s=median(lambda turn: turn.save.beside_s),
        save_s=median(lambda turn: turn.save.seconds),
        checkpoint_bytes=last.save.written,
        checkpoint_ratio=last.save.written / last.checkpoint_ideal,
    )


def table(engines: Mapping[str, EngineFigures]) -> str:
    """A column an engine."""
    columns = [dict(_rows(figures)) for figures in engines.values()]
    lines = ["".join([f"{'':<34}", *(f"{kind:>26}" for kind in engines)])]
    lines += ["".join([f"{name:<34}", *(f"{column[name]:>26}" for column in columns)]) for name in columns[0]]
    return "\n".join(lines)


def _rows(f: EngineFigures) -> Iterator[tuple[str, str]]:
    def of_step(seconds: float) -> str:
        return f"{seconds:.3f} s  {seconds / f.step_s:6.1%}"

    low, high = f.step_quartiles_s
    yield "step, median (quartiles)", f"{f.step_s:.3f} s ({low:.3f}-{high:.3f})"
    for part, seconds in f.parts_s.items():
        yield f"  {part}", of_step(seconds)
    yield "collectives: reduce", of_step(f.reduce_s)
    yield "collectives: gather", of_step(f.gather_s)
    yield "samples/s", f"{f.samples_per_s:.2f}"
    yield "video tokens/s", f"{f.tokens_per_s:,.0f}"
    yield "MFU", f"{f.mfu:.1%}" if f.mfu is not None else "peak unknown"
    yield "peak memory", f"{f.peak_bytes / MIB:,.0f} MiB" if f.peak_bytes is not None else "unknown"
    yield "optimiser bytes a rank", f"{f.optimiser_bytes / MIB:,.1f} MiB"
    yield "gradient bytes a rank", f"{f.gradient_bytes / MIB:,.1f} MiB"
    yield "both, of one rank's ideal", f"{f.state_share:.3f}x"
    yield "save: first stall", of_step(f.first_stall_s)
    yield "save: stall", of_step(f.stall_s)
    yield "save: a step beside the writing", of_step(f.beside_s)
    yield "save: seconds in the background", f"{f.save_s:.2f} s"
    yield "save: bytes, to the ideal", f"{f.checkpoint_bytes / MIB:,.1f} MiB {f.checkpoint_ratio:.4f}x"


def describe_loops(kind: str, loops: LoopFigures) -> str:
    def of(ratio: Ratio) -> str:
        low, high = ratio.quartiles
        return f"{ratio.median:.4f} ({low:.4f}-{high:.4f}), of all steps together {ratio.total:.4f}"

    return (
        f"{kind}: {loops.steps} steps of each loop in {loops.turns} turns; a step of the bare loop {loops.bare.wall_s:.3f} s "
        f"({loops.bare.cpu_s:.3f} s of CPU), of the trainer {loops.trainer.wall_s:.3f} s ({loops.trainer.cpu_s:.3f} s)\n"
        f"outside of train_step, backward and step the trainer spends {1000 * loops.own_s:.1f} ms of it, "
        f"{loops.own_s / loops.trainer.wall_s:.2%}\n"
        f"trainer to bare loop, median of the turns (quartiles):\n  time {of(loops.wall)}\n  CPU  {of(loops.cpu)}"
    )


def _configs(args: argparse.Namespace) -> dict[str, Config]:
    """By engine; a random batch has the first of the sizes."""
    given = load_config(args.config, args.overrides)
    kinds = (args.engines or given.engine.kind).split(",")
    configs = {kind: load_config(args.config, [*args.overrides, f"engine.kind={kind}"]) for kind in kinds}
    if args.synthetic_batch:
        for kind, config in configs.items():
            configs[kind] = replace(config, data=replace(config.data, sizes_px=config.data.sizes_px[:1]))
    return configs


def _plain(value: Any) -> Any:
    """Named tuples as mappings, all the way down."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else value


@contextmanager
def _only_warnings_logged() -> Iterator[None]:
    """For tables that a program around us reads, and puts back what that program had set."""
    logger = logging.getLogger("fw_train")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _shared_folder(config: Config, world: World) -> Iterator[Path]:
    """An empty folder of rank 0's making on the file system of the run, for as long as it is needed."""
    parent = Path(config.run.output).parent
    path = ""
    if world.rank == 0:
        parent.mkdir(parents=True, exist_ok=True)
        path = tempfile.mkdtemp(prefix="bench-", dir=parent)
    folder = Path(dist.gather_texts(path)[0])
    yield folder
    dist.barrier()
    if world.rank == 0:
        shutil.rmtree(folder)
