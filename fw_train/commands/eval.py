"""Judge trained weights on held-out clips: depth, points, cameras, their consistency, and diffusion, side by side.

    fw eval outputs/stage1/step-20000.safetensors data/held_out --output outputs/eval
    fw eval outputs/stage1/step-0.safetensors outputs/stage1/step-20000.safetensors data/held_out --clips 200
    torchrun --nproc-per-node 8 -m fw_train.cli eval CHECKPOINT ... DATA --output outputs/eval

DATA is a packed dataset that training has not seen. Geometry is judged at noise level 0.1 with the camera hidden. Beside the
networks stands the best constant prediction, the mean labels of the training clips that the configuration names. Each
checkpoint finds the configuration in its run's folder; --config gives one for all, and SECTION.KEY=VALUE changes it. With
--output come eval.json and pictures/, written last and whole; the same command again writes the same.
docs/evaluation.md defines every metric.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fw_train import dist
from fw_train.atomic_files import write_file
from fw_train.batch import Batch
from fw_train.build import world_params
from fw_train.config import Config
from fw_train.data.expand import expand_video
from fw_train.dist import World
from fw_train.evaluation.constant import mean_labels
from fw_train.evaluation.judge import cases, judge_constant, judge_diffusion, judge_geometry
from fw_train.evaluation.report import Evaluation, Judged, document, table
from fw_train.evaluation.scenes import scene
from fw_train.evaluation.validation import JUDGED_LEVEL, predict
from fw_train.inference import Trained, load_trained
from fw_train.monitoring.metrics_file import json_line
from fw_train.monitoring.terminal import Terminal
from fw_train.pictures.drawing import FAINT, SMALL, Picture, below, beside, framed, png_bytes, text_picture
from fw_train.pictures.scene import Scene, camera_sheet, depth_sheet
from fw_train.precision import PRECISIONS
from fw_train.run.data import BatchMaker, HeldOut
from fw_train.weights.stage import VIDEO_STAGE

log = logging.getLogger(__name__)

CONSTANT_CLIPS = 200
PICTURED = 4
COLLECTIVE_S = 3600.0  # a rank may have to wait for another's share of large clips
RESULT = "eval.json"


class Settings(NamedTuple):
    """What is measured, whatever the checkpoint."""

    level: float
    all_cases: bool
    clips: int | None  # None: as many as the run validates with
    constant_clips: int
    diffusion: bool
    pictures: int
    seed: int
    precision: str | None  # None: that of the training


class Part(NamedTuple):
    """Held-out clips as one configuration reads them."""

    config: Config
    held_out: HeldOut
    make_batch: BatchMaker


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="CHECKPOINT ... DATA",
        help="step-N.safetensors of one or several runs, then a packed dataset; SECTION.KEY=VALUE may follow",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"write {RESULT} and pictures/ there")
    parser.add_argument("--config", type=Path, metavar="FILE", help="instead of the config.yaml beside each checkpoint")
    parser.add_argument(
        "--level", type=float, default=JUDGED_LEVEL, metavar="S", help="noise level, 0 to 1 (default 0.1)"
    )
    parser.add_argument("--cases", action="store_true", help="also levels 0.5 and 0.9, and 0.1 with the camera given")
    parser.add_argument("--clips", type=int, metavar="N", help="held-out clips (default: run.validation_samples)")
    parser.add_argument(
        "--constant-clips", type=int, default=CONSTANT_CLIPS, metavar="N",
        help=f"training clips that the constant prediction is the mean of (default {CONSTANT_CLIPS}; 0: no constant)",
    )  # fmt: skip
    parser.add_argument("--no-diffusion", action="store_true", help="leave out the ten passes by timestep")
    parser.add_argument("--pictures", type=int, default=PICTURED, metavar="N", help=f"of N clips (default {PICTURED})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0, as in training)")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), help="instead of that of the training")
    parser.add_argument("--json", action="store_true", help=f"print {RESULT} instead of the table")
    parser.set_defaults(overrides=[])


def run(args: argparse.Namespace) -> int:
    overrides = [word for word in args.words if "=" in word and not Path(word).exists()]
    *checkpoints, data = [Path(word) for word in args.words if word not in overrides] or [Path()]
    _check(args, checkpoints, data)
    settings = Settings(
        args.level, args.cases, args.clips, args.constant_clips, not args.no_diffusion, args.pictures, args.seed,
        args.precision,
    )  # fmt: skip
    world = _start()

    def load(path: Path) -> Trained:
        return load_trained(path, args.config, [*overrides, *args.overrides], world.device, args.precision)

    evaluation = evaluate(checkpoints, data, settings, load, args.output, world)
    if world.rank == 0:
        text = json.dumps(json.loads(json_line(document(evaluation))), indent=1)
        if args.output:
            write_file(args.output / RESULT, text.encode() + b"\n")
        print(text if args.json else table(evaluation))
        if args.output:
            log.info("%s", args.output / RESULT)
    if world.size > 1:
        dist.finish(world)
    return 0


def evaluate(
    checkpoints: Sequence[Path],
    data: Path,
    settings: Settings,
    load: Callable[[Path], Trained],
    output: Path | None,
    world: World,
) -> Evaluation:
    """All checkpoints and the constant, one after the other; every rank calls it and gets the same figures."""
    terminal = Terminal(sys.stderr)
    terminal.interactive = terminal.interactive and world.rank == 0
    judged: list[Judged] = []
    scenes: dict[str, list[Scene]] = {}
    parts: list[Part] = []
    for path, name in zip(checkpoints, names_of(checkpoints), strict=True):
        trained = load(path)
        parts.append(_part(data, trained.config, settings.clips, world))
        _check_same_view(parts, name)
        metrics = _metrics(settings, trained, parts[-1], name, terminal, world)
        judged.append(Judged(name, str(path), trained.info.stage, trained.info.step, metrics))
        if trained.info.stage != VIDEO_STAGE and output and world.rank == 0:
            scenes[name] = list(_scenes(settings, trained, parts[-1], world))
        del trained  # two large networks at once may not fit
    with_labels = [part for part in parts if part.config.train.stage != VIDEO_STAGE]
    constant = _constant(settings.constant_clips, with_labels[0], terminal, world) if with_labels else {}
    terminal.close()
    pictures = draw(output / "pictures", scenes) if output and world.rank == 0 else []
    return Evaluation(str(data), len(parts[0].held_out), settings.level, settings.seed, judged, constant, pictures)


def names_of(checkpoints: Sequence[Path]) -> list[str]:
    """Short names that tell the checkpoints apart: as many folders in front of step-N as that takes, at least the run's."""
    parts = [path.resolve().with_suffix("").parts for path in checkpoints]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a checkpoint is named twice in {', '.join(map(str, checkpoints))}; name each once")


def draw(folder: Path, scenes: dict[str, list[Scene]]) -> list[str]:
    """A picture of depth and one of the cameras for each clip, the checkpoints below and beside each other."""
    written = []
    for clip in range(min(map(len, scenes.values()), default=0)):
        sheets: dict[str, Picture] = {
            "depth": below([_titled(name, depth_sheet(found[clip])) for name, found in scenes.items()]),
            "cameras": beside([_titled(name, camera_sheet(found[clip])) for name, found in scenes.items()]),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for kind, picture in sheets.items():
            path = folder / f"{kind}_{clip:02}.png"
            write_file(path, png_bytes(framed(picture)))
            written.append(f"{folder.name}/{path.name}")
    return written


def _check(args: argparse.Namespace, checkpoints: Sequence[Path], data: Path) -> None:
    if not checkpoints:
        raise ValueError("give at least one step-N.safetensors, and the folder of a packed dataset behind it")
    if not data.is_dir():
        raise ValueError(f"{data} is no folder; the last word is the packed dataset to judge on")
    if not 0 < args.level < 1:
        raise ValueError(f"--level {args.level} must lie between 0 and 1")
    for name in ("clips", "constant_clips", "pictures"):
        least = 1 if name == "clips" else 0
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to is told before the work


def _start() -> World:
    """This process among the others, or alone without a process group."""
    launch = dist.world_from_env(os.environ)
    if launch.rank > 0:
        logging.getLogger().setLevel(logging.WARNING)
    if launch.size > 1:
        return dist.start(COLLECTIVE_S)
    return World(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _part(data: Path, config: Config, clips: int | None, world: World) -> Part:
    samples = clips or config.run.validation_samples
    config = replace(
        config, data=replace(config.data, validation=str(data)), run=replace(config.run, validation_samples=samples)
    )
    wan = world_params(config).wan
    return Part(config, HeldOut(config, wan, world.rank, world.size), BatchMaker(config, wan, world.device))


def _check_same_view(parts: Sequence[Part], name: str) -> None:
    """Figures of other frames or sizes, or of another number of clips, do not compare."""
    seen = [
        f"{len(part.held_out)} clips of {part.config.data.frames} frames of "
        f"{', '.join(f'{height}x{width}' for height, width in part.config.data.sizes_px)}"
        for part in (parts[0], parts[-1])
    ]
    if seen[0] != seen[1]:
        raise ValueError(
            f"{name} is configured for {seen[1]}, the first checkpoint for {seen[0]}: give --clips, data.frames=... and "
            "data.sizes_px=... for both"
        )


def _metrics(
    settings: Settings, trained: Trained, part: Part, name: str, terminal: Terminal, world: World
) -> dict[str, float]:
    began, seed, dtype = time.monotonic(), settings.seed, _dtype(settings, trained)
    metrics: dict[str, float] = {}
    if trained.info.stage != VIDEO_STAGE:
        clips, judged = _clips(part, world, terminal, f"{name}: geometry"), cases(settings.level, settings.all_cases)
        metrics |= judge_geometry(trained.model, clips, judged, seed=seed, dtype=dtype, all_sum=dist.all_sum)
    if settings.diffusion:
        clips = _clips(part, world, terminal, f"{name}: diffusion")
        metrics |= judge_diffusion(trained.model, clips, seed=seed, dtype=dtype, all_sum=dist.all_sum)
    log.info("%s: %d clips in %.0f s", name, len(part.held_out), time.monotonic() - began)
    return metrics


def _constant(clips: int, part: Part, terminal: Terminal, world: World) -> dict[str, float]:
    sources = part.config.data.sources
    missing = [source.path for source in sources if not Path(source.path).is_dir()]
    if not clips or missing or not sources:
        why = "not asked for" if not clips else f"{missing[0]} is not here" if missing else "data.sources is empty"
        log.info("no constant prediction beside the networks: %s", why)
        return {}
    means = mean_labels(
        part.config, clips, rank=world.rank, world=world.size, all_sum=dist.all_sum,
        progress=_progress(terminal, "constant: mean labels"),
    )  # fmt: skip
    return judge_constant(means, _clips(part, world, terminal, "constant"), all_sum=dist.all_sum)


def _scenes(settings: Settings, trained: Trained, part: Part, world: World) -> Iterator[Scene]:
    dtype = _dtype(settings, trained)
    for number in range(min(settings.pictures, len(part.held_out))):
        coded = part.held_out.clip(number)
        batch = part.make_batch(coded)
        with torch.no_grad():
            prediction = predict(trained.model, batch, settings.level, settings.seed, dtype, camera=False)
        yield scene(prediction, batch, expand_video(coded, world.device))


def _dtype(settings: Settings, trained: Trained) -> torch.dtype:
    return PRECISIONS[settings.precision or trained.config.train.precision].compute


def _clips(part: Part, world: World, terminal: Terminal, what: str) -> Iterator[tuple[Batch, bool]]:
    total, progress = len(part.held_out), _progress(terminal, what)
    for done, (coded, counts) in enumerate(part.held_out.batches()):
        progress(min(done * world.size, total), total)
        yield part.make_batch(coded), counts


def _progress(terminal: Terminal, what: str) -> Callable[[int, int], None]:
    return lambda done, total: terminal.progress(done, total, f"{what} {done}/{total}")


def _titled(name: str, picture: Picture) -> Picture:
    return below([text_picture([name], picture.shape[1], SMALL, FAINT), picture], 0)
