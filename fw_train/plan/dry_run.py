"""Everything that a start does but the steps: each thing that would stop it is found and said, in seconds, without a GPU.

    fw train configs/stage1.yaml --dry-run --world 64

Nothing is allocated, claimed or left behind. Of weights the headers are read; networks have no storage. The ranks of the
world are played through: what each masters, and which samples each takes.
"""

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fw_train.build import base_identity, trainable_shapes, world_params
from fw_train.checkpoint.fragments import coverage_problems
from fw_train.checkpoint.layout import Checkpoint
from fw_train.checkpoint.loading import peek
from fw_train.conditioning import sidecar_kinds
from fw_train.config import Config
from fw_train.data.encodings import Encodings
from fw_train.data.loader import TrainingData
from fw_train.data.manifest import Dataset
from fw_train.data.order import SampleOrder, Segment, accumulation_steps, change_global_batch, rank_slice
from fw_train.data.sidecar import Sidecar, fingerprint
from fw_train.encoders.latents import load_latent_codec
from fw_train.model.world import FantasyWorldModel
from fw_train.plan.estimate import SPARE, Memory, disk_of, largest_size, memory_of
from fw_train.plan.memory import measure_step, meta_network
from fw_train.plan.shards import Parameters, owned, parameters_of
from fw_train.run.data import HeldOut, open_data
from fw_train.run.encodings import BASE, INIT_FROM, VALIDATION, encoding_problems, encodings_of
from fw_train.run.folder import refusal
from fw_train.run.resume import check_configuration, check_data
from fw_train.weights.base_hash import known_base_hash
from fw_train.weights.stage import read_stage_info, stored_encodings, validate_stage_weights
from fw_train.weights.wan import open_wan

T = TypeVar("T")
GIB = 2**30


class Report:
    """Lines as they come; a check that fails is a line too, and the others still run."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.problems = 0

    def run(self, part: str, check: Callable[[], tuple[str, T]]) -> T | None:
        """What the check found besides its line; None where it failed."""
        try:
            text, value = check()
        except (ValueError, OSError, RuntimeError) as error:
            self.wrong(part, str(error))
            return None
        self._say(f"ok     {part:<12}{text}")
        return value

    def wrong(self, part: str, text: str) -> None:
        self.problems += 1
        self._say(f"WRONG  {part:<12}{text}")


def dry_run(config: Config, allowed: Collection[str], world: int, say: Callable[[str], None] = print) -> int:
    """Checks a start on `world` GPUs; 1 where anything would stop it."""
    report = Report(say)
    model, groups = meta_network(config)
    parameters = parameters_of(model, groups, config.train.precision)
    accumulate = report.run("batch", lambda: _batch(config, world))
    report.run("output", lambda: _output(config, parameters))
    saved = report.run("checkpoint", lambda: _checkpoint(config, allowed))
    data, held_out = _data(report, config)
    encodings = report.run("encoders", lambda: _encoders(config, data)) if data else None
    if data and saved and encodings:
        report.run("same data", lambda: _same_data(saved, data, encodings, allowed))
    others: dict[str, Encodings | None] = {VALIDATION: held_out.encodings if held_out else None}
    if config.weights.base:
        others[BASE] = report.run("base", lambda: _base(config, model))
    if config.weights.init_from:
        others[INIT_FROM] = report.run("init_from", lambda: _init_from(config, model))
    for problem in encoding_problems(config, encodings or {}, others, allowed):
        report.wrong("encoders", problem)
    if accumulate:
        report.run("sharding", lambda: _sharding(config, parameters, world))
        report.run("memory", lambda: _memory(config, parameters, world))
        if data:
            report.run("samples", lambda: _samples(config, world, data, saved))
    plural = "" if report.problems == 1 else "s"
    say(
        f"{report.problems} problem{plural}"
        if report.problems
        else f"a start on {world} GPUs finds everything in place"
    )
    return 1 if report.problems else 0


def _batch(config: Config, world: int) -> tuple[str, int]:
    train = config.train
    accumulate = accumulation_steps(train.global_batch, world, train.micro_batch)
    return (
        f"{train.global_batch} = {world} GPUs x micro-batch {train.micro_batch} x {accumulate} accumulated",
        accumulate,
    )


def _output(config: Config, parameters: Parameters) -> tuple[str, None]:
    """Writable, not in use, and room for two checkpoints more than are kept."""
    output = Path(config.run.output)
    held = refusal(output)
    if held:
        raise ValueError(held)
    place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder, and {output} is to be one; choose another run.output")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{place} is not writable ({error.strerror}); choose another run.output") from None
    free = shutil.disk_usage(place).free
    needed = disk_of(config, parameters, step_s=1.0).save_bytes * (config.run.keep_last + 1)
    if free < needed:
        raise ValueError(
            f"{place} has {free / 1e9:.1f} GB free; {config.run.keep_last} checkpoints and one being written need "
            f"{needed / 1e9:.1f} GB: make room, or lower run.keep_last"
        )
    return f"{output}: writable, free for a run, {free / 1e9:,.0f} GB of which {needed / 1e9:.1f} are needed", None


def _checkpoint(config: Config, allowed: Collection[str]) -> tuple[str, Checkpoint | None]:
    """What a start would go on from, and whether this configuration may."""
    if config.run.resume == "never":
        return "run.resume=never: a new run begins", None
    found = peek(Path(config.run.output), config.run.resume)
    if found is None:
        return "none yet: a new run begins", None
    state = found.manifest.run_state(rng=None)
    check_configuration(state, config, allowed, _identity(config) or state.base_hash)
    return f"goes on from {found.path}, saved on {state.world_size} ranks", found


def _identity(config: Config) -> str | None:
    """What the base weights are; None: their bytes must be read for it, which the start does once."""
    return known_base_hash(config.weights.base) if config.weights.base else base_identity(config)


def _data(report: Report, config: Config) -> tuple[TrainingData | None, HeldOut | None]:
    """Every source by itself, so that each says what it lacks, then the mix; the clips held out."""
    lacks = [text for source in config.data.sources for text in _lacks(config, source.path)]
    for text in lacks:
        report.wrong("data", text)
    data, held_out = None if lacks else report.run("data", lambda: _mix(config)), None
    if config.data.validation:
        lacks = list(_lacks(config, config.data.validation))
        for text in lacks:
            report.wrong("validation", text)
        if not lacks:
            held_out = report.run("validation", lambda: _held_out(config))
    return data, held_out


def _held_out(config: Config) -> tuple[str, HeldOut]:
    held_out = HeldOut(config, world_params(config).wan, 0, 1)
    return f"{len(held_out)} clips", held_out


def _lacks(config: Config, path: str) -> Iterator[str]:
    """What is missing or damaged of a dataset and of each sidecar that the variant reads."""
    try:
        dataset = Dataset(path)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    for kind in sidecar_kinds(world_params(config).wan, online=config.data.latents == "online"):
        try:
            Sidecar(dataset, kind)
        except (ValueError, OSError) as error:
            yield str(error)


def _mix(config: Config) -> tuple[str, TrainingData]:
    vae = config.data.vae
    if config.data.latents == "online" and vae != "dct" and not Path(vae).exists():
        raise ValueError(f"data.vae={vae}: there is no such file or folder")
    data = open_data(config, world_params(config).wan)
    if data.empty_text is None:
        raise ValueError("the data have no texts; make them with `fw data encode`")
    streams = ", ".join(f"{stream.name} {stream.size:,}" for stream in data.streams)
    return f"{sum(stream.size for stream in data.streams):,} samples ({streams})", data


def _encoders(config: Config, data: TrainingData) -> tuple[str, Encodings]:
    """What the data were encoded with; a VAE that encodes while training is loaded for it."""
    codec = load_latent_codec(config.data.vae) if config.data.latents == "online" else None
    encodings = encodings_of(data, world_params(config).wan, codec)
    return ", ".join(f"{kind} {fingerprint(facts)[:16]}" for kind, facts in sorted(encodings.items())), encodings


def _same_data(
    saved: Checkpoint, data: TrainingData, encodings: Encodings, allowed: Collection[str]
) -> tuple[str, None]:
    check_data(saved.manifest.run_state(rng=None), data, encodings, allowed)
    return "those of the checkpoint", None


def _base(config: Config, model: FantasyWorldModel) -> tuple[str, Encodings | None]:
    weights = config.weights
    file = open_wan(model.video, weights.base, weights.widen_input)
    known = known_base_hash(weights.base)
    hashed = f"hash {known[:16]}..." if known else "its hash is not known yet: the start reads it once"
    return f"{file.reader.path}: {len(file.wanted)} tensors fit; {hashed}", stored_encodings(file.reader)


def _init_from(config: Config, model: FantasyWorldModel) -> tuple[str, Encodings | None]:
    path = config.weights.init_from
    info, identity = read_stage_info(path), _identity(config)
    validate_stage_weights(path, trainable_shapes(model, "stage1"), "stage1", identity or info.base_hash)
    compared = "trained on this base" if identity else f"trained on the base {info.base_hash[:16]}..., not compared yet"
    return f"{path}: step {info.step} of {info.stage}, {compared}", info.encodings


def _sharding(config: Config, parameters: Parameters, world: int) -> tuple[str, None]:
    """Every rank's part of masters and moments: together all, each element once."""
    ranks = [owned(config, parameters.groups, rank, world) for rank in range(world)]
    held = [piece for pieces in ranks for piece in pieces]
    names = {name for group in parameters.groups for name in group}
    wrong = coverage_problems(held)
    wrong += [f"{name} is held by no rank" for name in sorted(names - {piece.name for piece in held})]
    shares = [sum(piece.numel for piece in pieces) for pieces in ranks]
    if wrong:
        raise ValueError(f"{sum(shares):,} of {parameters.trainable:,} parameters are held: {'; '.join(wrong[:3])}")
    return (
        f"{world} ranks master {parameters.trainable:,} parameters, {min(shares):,} to {max(shares):,} each; "
        f"the largest is {max(shares) * world / parameters.trainable:.3f}x an equal share"
    ), None


def _memory(config: Config, parameters: Parameters, world: int) -> tuple[str, Memory]:
    """By plan; compared with the GPU where there is one here."""
    step = measure_step(config, config.train.activation_checkpointing, largest_size(config))
    memory = memory_of(config, world, step, parameters)
    text = f"{memory.total / GIB:.1f} GiB of a GPU"
    if torch.cuda.is_available():
        usable = (1 - SPARE) * torch.cuda.get_device_properties(0).total_memory
        if memory.total > usable:
            raise ValueError(
                f"{text}, and {usable / GIB:.1f} GiB can be used; `fw plan CONFIG --gpus {world}` says what would fit"
            )
    return f"{text}; `fw plan CONFIG --gpus {world} --device NAME` has the parts", memory


def _samples(config: Config, world: int, data: TrainingData, saved: Checkpoint | None) -> tuple[str, None]:
    """Which samples each rank takes in some of the steps to come: together the global batch, each once."""
    train = config.train
    first = saved.manifest.step if saved else 0
    segments: tuple[Segment, ...] = (Segment(0, train.global_batch),)
    if saved:
        segments = change_global_batch(saved.manifest.run_state(rng=None).segments, first, train.global_batch)
    order = SampleOrder(train.seed, data.streams, segments)
    steps = sorted({step for step in (first, first + 1, (first + train.steps) // 2, train.steps - 1) if step >= first})
    seen: set[int] = set()
    for step in steps:
        drawn = order.step_ids(step)
        taken = [
            drawn.positions[part] for rank in range(world) for part in _slices(train.global_batch, rank, world, config)
        ]
        together = np.concatenate(taken)
        if not np.array_equal(np.sort(together), drawn.positions) or seen & set(together.tolist()):
            raise ValueError(f"step {step}: the ranks' samples are not the global batch, each once")
        seen |= set(together.tolist())
    return (
        f"steps {', '.join(map(str, steps))}: the {world} ranks take the global batch of each, every sample once",
        None,
    )


def _slices(global_batch: int, rank: int, world: int, config: Config) -> list[slice]:
    micro_batch = config.train.micro_batch
    count = accumulation_steps(global_batch, world, micro_batch)
    layout = {"rank": rank, "world": world, "micro_batch": micro_batch, "accumulate": count}
    return [rank_slice(global_batch, **layout, micro_step=micro_step) for micro_step in range(count)]
