"""Pack a raw folder into shards, plain WebDataset tars with an index each, and a manifest of the whole.

    fw data pack raw/ packed/
    fw data pack raw/ packed/ --frames 81 --workers 16
    fw data pack raw/ packed/ --task 3/8        # the third of eight jobs; inside a SLURM array the task follows from it

Clips are sorted by size and length, then id; a shard holds one size and length. Clips that cannot be packed are left out,
with their reason in `rejects.jsonl`. A killed run is continued by running it again: finished shards are kept, and the result
is the same byte for byte. Whichever run finds all shards finished writes the manifest. Layout: docs/data-format.md.
"""

import argparse
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from data_tools.pack_sample import pack_sample, sample_totals
from data_tools.shared_folder import write_last
from data_tools.work import Progress, add_workers, run_parallel
from fw_train.atomic_files import new_file, write_file
from fw_train.data import schema
from fw_train.data.codec_format import PRESET_NAMES
from fw_train.data.manifest import (
    IndexHeader,
    Rejected,
    Settings,
    ShardIndex,
    Totals,
    dataset_files,
    index_bytes,
    index_path,
    iter_shards,
    read_index,
    write_dataset_files,
)
from fw_train.data.schema import Bucket, RawClip
from fw_train.data.shards import (
    ShardError,
    shard_path,
    sort_key,
    write_tar,
)
from fw_train.data.strict_json import SchemaError

log = logging.getLogger(__name__)


class ShardPlan(NamedTuple):
    """The clips that a shard is made from."""

    name: str
    bucket: Bucket
    clips: tuple[RawClip, ...]
    rejects: tuple[Rejected, ...]  # what the metadata alone rules out; in the first shard's plan

    def fingerprint(self) -> str:
        """Changes with the metadata of any of its clips."""
        clips, left_out = [asdict(clip) for clip in self.clips], [reject.id for reject in self.rejects]
        text = json.dumps([schema.VERSION, str(self.bucket), clips, left_out])
        return hashlib.sha256(text.encode()).hexdigest()


class Task(NamedTuple):
    """Part `number` (from 1) of `count`."""

    number: int
    of: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("raw", metavar="RAW", type=Path, help="folder with metadata.json, videos, depth, points, ...")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards; made if need be")
    parser.add_argument("--preset", choices=PRESET_NAMES, default="default", help="precision of the labels")
    parser.add_argument("--frames", type=_positive, help="take the first N frames of each clip (4k + 1)")
    parser.add_argument("--shard-size", type=_positive, default=128, help="most samples in a shard (default 128)")
    parser.add_argument("--task", type=parse_task, metavar="I/N", help="pack this part of the shards, I from 1 to N")
    parser.add_argument(
        "--manifest-only", action="store_true", help="pack nothing, write the manifest of finished shards"
    )
    add_workers(parser, "about 1 GB each at 81x336x592")


def run(args: argparse.Namespace) -> int:
    settings = Settings(args.preset, args.frames, args.shard_size)
    task = args.task or slurm_task(os.environ) or Task(1, 1)
    schema.refuse_url(args.out)
    plans = plan_shards(args.raw, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    strangers = sorted(set(iter_shards(args.out)) - {plan.name for plan in plans})
    if strangers:
        raise ShardError(f"{args.out} holds {strangers[0]}, which {args.raw} does not give; pack into a new folder")
    if not args.manifest_only:
        mine = plans[task.number - 1 :: task.of]
        todo = [plan for plan in mine if not is_finished(args.out, plan, settings)]
        clips = sum(len(plan.clips) for plan in todo)
        log.info(f"{len(mine)} shards in this task, {len(mine) - len(todo)} finished before, {clips} clips to pack")
        jobs = [(str(args.out), str(args.raw), plan, settings) for plan in todo]
        with Progress(clips, "clips") as progress:
            for _ in run_parallel(pack_shard, jobs, args.workers, progress):
                pass
    return finish(args.out, plans, settings, must=args.manifest_only)


def plan_shards(raw: Path, settings: Settings) -> list[ShardPlan]:
    """All shards of a dataset: a function of the metadata, the settings and, where it is not given, each clip's length."""
    clips: list[tuple[Bucket, RawClip]] = []
    rejects: list[Rejected] = []
    entries = schema.read_metadata(raw)
    ids = Counter(entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str))
    strange: Counter[str] = Counter()
    for number, entry in enumerate(entries):
        where = f"metadata.json, entry {number}"
        clip_id = entry.get("id") if isinstance(entry, dict) else None
        try:
            clip = schema.read_clip(entry, where)
            if ids[clip.id] > 1:
                raise SchemaError(f"{where}: the id {clip.id} is given {ids[clip.id]} times")
            frames = settings.frames or clip.frames or schema.count_frames(schema.label_folder(raw, "depth", clip.id))
            bucket = Bucket(clip.height, clip.width, frames)
            bucket.check()
        except SchemaError as error:
            rejects.append(Rejected(clip_id if isinstance(clip_id, str) else "", _without(raw, error)))
            continue
        strange.update(name for name in entry if name not in RawClip.__dataclass_fields__)
        clips.append((bucket, clip))
    if strange:
        names = ", ".join(f"{name} ({count} clips)" for name, count in sorted(strange.items()))
        log.warning(f"metadata.json has entries that packing does not know and leaves out: {names}")
    if not clips:
        raise SchemaError(f"no clip of {raw} can be packed; {_reasons(rejects)}")
    clips.sort(key=lambda item: (item[0], sort_key(item[1].id)))

    plans: list[ShardPlan] = []
    for bucket, group in groupby(clips, key=lambda item: item[0]):
        members = [clip for _, clip in group]
        shards = -(-len(members) // settings.shard_size)
        for part in range(shards):  # equal parts: no shard is nearly empty
            first, last = (len(members) * at // shards for at in (part, part + 1))
            early = () if plans else tuple(rejects)
            plans.append(ShardPlan(f"shard-{len(plans):06}", bucket, tuple(members[first:last]), early))
    return plans


def is_finished(out: Path, plan: ShardPlan, settings: Settings) -> bool:
    """Whether a shard and its index are there and belong together; an error where they are of another plan."""
    if not index_path(out, plan.name).is_file():
        return False
    try:
        header = read_index(out, plan.name).header
    except ValueError as error:
        log.warning(f"{error}; {plan.name} is packed again")
        return False
    check_plan(out, plan, settings, header)
    tar = shard_path(out, plan.name)
    if not tar.is_file() or tar.stat().st_size != header.tar_bytes:
        log.warning(f"{tar} is missing or has another size than its index says; it is packed again")
        return False
    return True


def check_plan(out: Path, plan: ShardPlan, settings: Settings, header: IndexHeader) -> None:
    """Refuses to mix shards that were made from other clips or otherwise."""
    if header.settings != settings:
        raise ShardError(
            f"{out / plan.name} was packed with {header.settings}, this run has {settings}; use the same or a new folder"
        )
    if header.plan != plan.fingerprint():
        raise ShardError(f"{out / plan.name} was packed from other clips or other metadata; pack into a new folder")


def pack_shard(job: tuple[str, str, ShardPlan, Settings], advance: Callable[[int], None]) -> None:
    """Writes a shard's tar and then its index."""
    torch.set_num_threads(1)
    out, raw, plan, settings = Path(job[0]), Path(job[1]), job[2], job[3]
    rejects, totals = list(plan.rejects), Totals()

    def samples() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        nonlocal totals
        for clip in plan.clips:
            try:
                members, info = pack_sample(raw, clip, plan.bucket, settings.preset)
            except ValueError as error:
                rejects.append(Rejected(clip.id, _without(raw, error)))
            else:
                totals += sample_totals(info, len(members[schema.VIDEO]))
                yield clip.id, members
            advance(1)

    with new_file(shard_path(out, plan.name)) as file:
        tar = write_tar(file, samples())
    header = IndexHeader(
        schema.VERSION,
        plan.name,
        str(plan.bucket),
        plan.fingerprint(),
        settings,
        tar.bytes,
        tar.sha256,
        len(rejects),
        totals,
    )
    write_file(index_path(out, plan.name), index_bytes(ShardIndex(header, tar.samples, tuple(rejects))))


def finish(out: Path, plans: list[ShardPlan], settings: Settings, must: bool) -> int:
    """Writes what joins the shards once all are there; returns the exit code."""
    missing = [plan.name for plan in plans if not index_path(out, plan.name).is_file()]
    if missing:
        log.info(
            f"{len(plans) - len(missing)} of {len(plans)} shards are finished, without {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; the task that finishes the last one writes the manifest"
        )
        return 1 if must else 0
    indexes = []
    for plan in plans:
        index = read_index(out, plan.name)
        check_plan(out, plan, settings, index.header)
        indexes.append(index)
    join_shards(out, indexes)
    rejects = [reject for index in indexes for reject in index.rejects]
    totals = sum((index.header.totals for index in indexes), Totals())
    log.info(f"{totals.samples} samples in {len(plans)} shards, {len(rejects)} clips rejected: {out}")
    if totals.captions_missing:
        log.warning(f"{totals.captions_missing} samples have no caption")
    if rejects:
        log.warning(f"{out / 'rejects.jsonl'}: {_reasons(rejects)}")
    if not totals.samples:
        log.error(f"{out} holds no samples, since every clip was rejected")
        return 1
    return 0


def join_shards(out: Path, indexes: list[ShardIndex]) -> None:
    """Writes table, rejects and manifest and clears away; tasks that end together may do so at once, with the same bytes."""
    files = dataset_files(indexes)
    write_last(out, lambda: write_dataset_files(out, files))


def parse_task(text: str) -> Task:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, as 3/8")
    return Task(int(number), int(count))


def slurm_task(environment: Mapping[str, str]) -> Task | None:
    """The part that a SLURM array job stands for; None outside of one."""
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    try:
        this, count = int(environment["SLURM_ARRAY_TASK_ID"]), int(environment["SLURM_ARRAY_TASK_COUNT"])
        first, step = int(environment["SLURM_ARRAY_TASK_MIN"]), int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
    except (KeyError, ValueError) as error:
        raise ValueError(f"the variables of the SLURM array are incomplete ({error}); give --task I/N") from None
    number, rest = divmod(this - first, max(step, 1))
    if rest or not 0 <= number < count:
        raise ValueError(
            f"SLURM array task {this} is not one of {count} from {first} in steps of {step}; submit --array=0-N, or give --task I/N"
        )
    return Task(number + 1, count)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _without(raw: Path, error: Exception) -> str:
    """The message without the folder's own path, so that results do not depend on where it lies."""
    return str(error).replace(f"{raw}{os.sep}", "")


def _reasons(rejects: Iterable[Rejected]) -> str:
    shown = list(rejects)
    text = "; ".join(f"{reject.id or 'an entry'}: {reject.reason}" for reject in shown[:3])
    return text + (f"; and {len(shown) - 3} more" if len(shown) > 3 else "")
