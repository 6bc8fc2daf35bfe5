"""Encode the videos and captions of a packed dataset once: latents, text and image features in tars beside its shards.

    fw data encode packed/ --codec dct --text hash:64              # without weights, for demos and tests
    fw data encode packed/ --model Wan2.1-T2V-1.3B/                # latents and text; `pip install 'fw-train[encode]'`
    fw data encode packed/ --model Wan2.1-I2V-14B/ --members latent,image,text,clip --size 336x592 --frames 81
    torchrun --nproc-per-node 8 -m fw_train.cli data encode packed/ --model Wan2.1-T2V-1.3B/      # a part for each GPU
    fw data encode packed/ --model Wan2.1-T2V-1.3B/ --task 3/8     # the third of eight jobs; a SLURM array sets it by itself

The folder of the model has the layout of the original or of diffusers. Image-to-video models need the members image and clip.
A killed run is continued by running it again. Encoders, weights and preprocessing have a fingerprint in every file: other
ones are refused, here and in training, until the folder is removed or --replace is given. Whichever run finds all shards
finished writes `sidecar.jsonl`. Layout: docs/data-format.md.
"""

import argparse
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_tools.encode_sample import Recipe, encode_sample, load_encoder
from data_tools.pack import Task, parse_task, slurm_task
from data_tools.shared_folder import write_last
from data_tools.work import Progress, run_parallel
from fw_train.data.manifest import Dataset, ManifestShard, index_path
from fw_train.data.schema import Bucket
from fw_train.data.shards import ShardError, shard_path
from fw_train.data.sidecar_files import (
    SIDECAR,
    Facts,
    check_source,
    difference,
    fingerprint,
    finish_sidecar,
    read_index,
    read_manifest,
    write_shard,
)
from fw_train.data.sidecar_tensor import KINDS, LATENT_KINDS, sidecar_facts, tensor_bytes
from fw_train.dist import Launch, world_from_env

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The sidecar of a shard."""

    out: str
    source: ManifestShard
    recipe: Recipe
    facts: Facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that `fw data pack` wrote")
    parser.add_argument("--model", metavar="DIR", help="Wan folder with the encoders")
    parser.add_argument("--codec", metavar="NAME", help="latents without weights: dct")
    parser.add_argument("--text", metavar="NAME", help="text without weights: hash:D for D features, as hash:64")
    parser.add_argument(
        "--members", type=_parse_members, metavar="A,B", help=f"of {', '.join(KINDS)} (default: latent and text)"
    )
    parser.add_argument(
        "--size", type=_parse_size, metavar="HxW", help="height x width to scale and crop to (default: as they are)"
    )
    parser.add_argument(
        "--frames", type=int, metavar="T", help="encode the first T frames (default: as many as labels)"
    )
    parser.add_argument("--task", type=parse_task, metavar="I/N", help="encode this part of the shards, I from 1 to N")
    parser.add_argument("--replace", action="store_true", help="encode shards that were made otherwise again")
    parser.add_argument("--device", help="where encoders run (default: this process's GPU, or the processor)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: 1 with --model, else one for each core)"
    )


def run(args: argparse.Namespace) -> int:
    dataset = Dataset(args.out)
    launch = world_from_env(os.environ)
    device = args.device or (f"cuda:{launch.local_rank}" if torch.cuda.is_available() else "cpu")
    recipes = plan_recipes(args, dataset, device)
    task = split_task(args.task or slurm_task(os.environ) or Task(1, 1), launch)
    mine = dataset.manifest.shards[task.number - 1 :: task.of]
    for recipe in recipes:
        encode_kind(dataset, recipe, mine, args.replace, args.workers or _default_workers(recipe))
    return 0


def plan_recipes(args: argparse.Namespace, dataset: Dataset, device: str) -> list[Recipe]:
    """One for each member that is asked for; refuses sizes and lengths that cannot be encoded before anything is loaded."""
    names = {"latent": args.codec or args.model, "text": args.text or args.model, "clip": args.model}
    names["image"] = names["latent"]
    members = args.members or tuple(kind for kind in ("latent", "text") if names[kind])
    missing = [kind for kind in members if not names[kind]]
    if missing or not members:
        raise ValueError(
            f"nothing says how to encode {' and '.join(missing or ('latent', 'text'))}: give --model DIR (a Wan folder), or "
            "without weights --codec dct for latents and images, --text hash:64 for text"
        )
    for rows in dataset.buckets:
        bucket = Bucket.parse(rows.bucket)
        if args.frames is not None and args.frames > bucket.frames:
            raise ValueError(
                f"--frames {args.frames}: the clips of {bucket} have {bucket.frames}; ask for that at most"
            )
        height, width = args.size or bucket[:2]
        Bucket(height, width, args.frames or bucket.frames).check()
    # A dataset is encoded kind by kind, so that one encoder is in memory; both kinds of latents follow each other.
    order = [kind for kind in ("text", "clip", "latent", "image") if kind in members]
    return [
        Recipe(
            kind,
            names[kind],
            device,
            args.size if kind != "text" else None,
            args.frames if kind in LATENT_KINDS else None,
        )
        for kind in order
    ]


def encode_kind(
    dataset: Dataset, recipe: Recipe, shards: tuple[ManifestShard, ...], replace: bool, workers: int
) -> None:
    """Writes the sidecars of these shards that are not there, and what joins them once those of all shards are."""
    folder = dataset.folder / recipe.kind
    facts = sidecar_facts(recipe.kind, load_encoder(recipe).fingerprint_facts, recipe.size, recipe.frames)
    _check_joint(folder, recipe.kind, dataset, facts, replace)
    todo = [line for line in shards if not is_finished(folder, recipe.kind, line, facts, replace)]
    samples = sum(line.totals.samples for line in todo)
    log.info(
        f"{recipe.kind}: {len(shards)} shards in this task, {len(shards) - len(todo)} finished before, {samples} samples to "
        f"encode, fingerprint {fingerprint(facts)[:16]}"
    )
    jobs = [Job(str(dataset.folder), line, recipe, facts) for line in todo]
    with Progress(samples, "samples") as progress:
        for _ in run_parallel(encode_shard, jobs, workers, progress):
            pass
    others = [line for line in dataset.manifest.shards if not _is_written(folder, recipe.kind, line, facts, replace)]
    if others:
        log.info(
            f"{recipe.kind}: {len(others)} of {len(dataset.manifest.shards)} shards are still to come; the task that finishes the "
            f"last one writes {SIDECAR}"
        )
        return
    _finish(folder, dataset, recipe)
    log.info(f"{folder}: {len(dataset)} samples")


def encode_shard(job: Job, advance: Callable[[int], None]) -> None:
    """Writes the sidecar of a shard."""
    if multiprocessing.parent_process() is not None:  # one of several, which have a core each
        torch.set_num_threads(1)
    dataset = Dataset(job.out)
    kind = job.recipe.kind

    def samples() -> Iterator[tuple[str, Tensor]]:
        for row in range(job.source.first, job.source.first + job.source.totals.samples):
            yield dataset.sample(row).key, encode_sample(job.recipe, dataset, row)
            advance(1)

    write_shard(dataset.folder / kind, kind, job.source, job.facts, samples())


def is_finished(folder: Path, kind: str, source: ManifestShard, facts: Facts, replace: bool) -> bool:
    """Whether a shard's sidecar is there, with its index, and was made like this; an error where it was made otherwise."""
    if not index_path(folder, source.shard).is_file():
        return False
    try:
        index = read_index(folder, kind, source.shard)
    except ValueError as error:
        log.warning(f"{error}; it is encoded again")
        return False
    if index.facts != facts:
        if replace:
            return False
        raise ShardError(_otherwise(folder / source.shard, facts, index.facts))
    if not replace:
        check_source(index, source)
    elif index.header.source_sha256 != source.tar_sha256:
        return False
    tar = shard_path(folder, source.shard)
    if not tar.is_file() or tar.stat().st_size != index.header.tar_bytes:
        log.warning(f"{tar} is missing or has another size than its index says; it is encoded again")
        return False
    return True


def _is_written(folder: Path, kind: str, source: ManifestShard, facts: Facts, replace: bool) -> bool:
    """Whether a shard's sidecar is there; where all are replaced, the new one."""
    if not index_path(folder, source.shard).is_file():
        return False
    return not replace or read_index(folder, kind, source.shard).facts == facts


def split_task(task: Task, launch: Launch) -> Task:
    """The part of a part that falls to this process where a launcher started several for it."""
    return Task((task.number - 1) * launch.size + launch.rank + 1, task.of * launch.size)


def _check_joint(folder: Path, kind: str, dataset: Dataset, facts: Facts, replace: bool) -> None:
    """Refuses a finished folder that was made otherwise; with --replace it ceases to be finished."""
    if not (folder / SIDECAR).is_file():
        return
    try:
        manifest = read_manifest(folder, kind)
    except ValueError as error:
        log.warning(f"{error}; it is written again")
        return
    if manifest.facts == facts and manifest.header.dataset_sha256 == dataset.manifest.header.rows_sha256:
        return
    if replace:
        (folder / SIDECAR).unlink(missing_ok=True)
    elif manifest.facts != facts:
        raise ShardError(_otherwise(folder, facts, manifest.facts))


def _otherwise(what: Path, facts: Facts, found: Facts) -> str:
    return (
        f"{what} was encoded otherwise: its fingerprint is {fingerprint(found)[:16]}, this run's is {fingerprint(facts)[:16]} "
        f"({difference(facts, found)}); encode as before, give --replace, or remove that folder"
    )


def _finish(folder: Path, dataset: Dataset, recipe: Recipe) -> None:
    """Writes what joins the shards and clears away; tasks that end together may do so at once, with the same bytes."""
    empty = None
    if recipe.kind == "text":
        empty = tensor_bytes("text", load_encoder(recipe).encode([""])[0], "the empty text")
    write_last(folder, lambda: finish_sidecar(folder, recipe.kind, dataset.manifest, empty))


def _default_workers(recipe: Recipe) -> int:
    """Weights are loaded once a process."""
    return len(os.sched_getaffinity(0)) if recipe.encoder == "dct" or recipe.encoder.startswith("hash:") else 1


def _parse_members(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(KINDS)}, joined by commas")
    return kinds


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not height x width, as 336x592")
    return int(height), int(width)
