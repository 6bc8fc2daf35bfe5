"""Bring clips, cameras and labels of other tools into a raw folder, which `fw data pack` reads.

    fw data convert re10k cameras/ raw/ --pictures frames/ --size 336x592 --frames 81
    fw data convert colmap dense/ raw/
    fw data convert nerfstudio scene/ raw/
    fw data convert vggt predictions.npz raw/ --video clip.mp4
    fw data convert dust3r scene.npz raw/ --video clip.mp4
    fw data convert depth-anything depth.npz raw/ --depth-kind affine_disparity

Where a folder of scenes is given, all are converted, and one that cannot be does not stop the others. Clips are cut to 4k + 1
frames, cropped about the centre and resized, labels and intrinsics with them. Repeating a command continues it; clips that are
there already stay. What each tool must have left, and which labels it gives: docs/labels.md.
"""

import argparse
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch

from data_tools.convert_clip import UNFINISHED, Converted, Cut, Source, convert_clip, place, remove_replaced
from data_tools.convert_nerfstudio import FILE
from data_tools.convert_scenes import find_scenes, read_scene
from data_tools.framing import FITS
from data_tools.shared_folder import only_writer
from data_tools.work import Progress, add_workers, run_parallel
from fw_train.atomic_files import write_file
from fw_train.batch import latent_frames
from fw_train.data import schema
from fw_train.geometry import RE10K_SIZE

log = logging.getLogger(__name__)

COMMIT_EVERY_S = 10.0


class Job(NamedTuple):
    clip_id: str
    read: Callable[[], Source]
    raw: Path
    cut: Cut
    entry: dict[str, Any]  # of metadata.json, as far as there is one


class Outcome(NamedTuple):
    clip_id: str
    converted: Converted | None
    failure: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)

    re10k = _source(sources, "re10k", "RealEstate10K's camera files", "CAMERAS", "a camera file, or a folder of them")
    re10k.add_argument(
        "--pictures",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="ID/TIMESTAMP.png or ID.mp4 for each clip, or the whole videos named by YouTube's id",
    )
    re10k.add_argument(
        "--original-size",
        type=_size,
        default=RE10K_SIZE,
        metavar="HxW",
        help="height x width of the original frames, where those here were cropped from them (720x1280)",
    )
    colmap = _source(sources, "colmap", "COLMAP's workspaces", "SCENE", "a folder with sparse/ and images/, or of such")
    colmap.add_argument("--images", default="images", metavar="NAME", help="the scene's folder of frames (images)")
    _source(sources, "nerfstudio", "Nerfstudio's scenes", "SCENE", f"a folder with {FILE}, or a folder of such folders")
    for name, title in (("vggt", "VGGT's predictions"), ("dust3r", "DUSt3R's and MASt3R's scenes")):
        labels = _source(sources, name, title, "FILE", "an npz file, a folder of npy files, or a folder of npz files")
        labels.add_argument(
            "--video",
            type=Path,
            help="the video or folder of images that the network saw, or a folder of them named like the npz files; "
            "default: the folder `images` beside FILE if there is one, else the clip's video in RAW",
        )
        labels.add_argument(
            "--fit", choices=FITS, help="how the network saw the frames (default: as its own loader does)"
        )
        labels.add_argument(
            "--min-confidence", type=float, metavar="C", help="labels below this confidence become invalid"
        )
    depth = _source(
        sources,
        "depth-anything",
        "depth of Depth Anything for clips in RAW",
        "FILE",
        "npz or npy [T, h, w], a folder of one npy for each frame, or a folder of clips",
        cuts=False,
    )
    depth.add_argument(
        "--depth-kind",
        choices=("affine_disparity", "affine_depth", "metric"),
        required=True,
        help="affine_disparity: the relative models; metric: the metric ones, in the units of the clip's cameras",
    )


def _source(
    sources: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    title: str,
    metavar: str,
    what: str,
    cuts: bool = True,
) -> argparse.ArgumentParser:
    parser = sources.add_parser(name, help=title, description=title)
    parser.add_argument("scenes", type=Path, metavar=metavar, help=what)
    parser.add_argument("raw", type=Path, metavar="RAW", help="raw folder; made if need be")
    parser.add_argument("--id", help="the clip's id, where there is one (default: the name of its file or folder)")
    parser.add_argument("--caption", help="the clips' caption (default: as it is in RAW, else none)")
    if cuts:
        parser.add_argument(
            "--size",
            type=_clip_size,
            metavar="HxW",
            help="crop to this aspect and resize (default: crop to multiples of 16)",
        )
        parser.add_argument("--start", type=int, default=0, metavar="N", help="first frame to take (0)")
        parser.add_argument(
            "--frames", type=_frames, metavar="T", help="frames to take, 4k + 1 (default: as many as there are)"
        )
        parser.add_argument("--stride", type=int, default=1, metavar="N", help="take every N-th frame (1)")
        parser.add_argument("--fps", type=Fraction, help="of the frames before --stride, where they are images (24)")
    add_workers(parser, "about 1 GB each")
    return parser


def run(args: argparse.Namespace) -> int:
    cut = Cut()
    if args.source != "depth-anything":
        if args.start < 0 or args.stride < 1 or (args.fps is not None and args.fps <= 0):
            raise ValueError(f"--start {args.start}, --stride {args.stride}, --fps {args.fps}: give 0, 1 and more")
        cut = Cut(args.size, args.start, args.frames, args.stride, args.fps)
    scenes = find_scenes(args.source, args.scenes)
    if args.id is not None:
        if len(scenes) != 1:
            raise ValueError(f"--id {args.id} names one clip, {args.scenes} has {len(scenes)}")
        (path,) = scenes.values()
        scenes = {args.id: path}
    args.raw.mkdir(parents=True, exist_ok=True)
    with only_writer(args.raw, f"another command writes to {args.raw}; wait for it"):
        entries = _entries(args.raw)
        by_id = {entry.get("id"): entry for entry in entries if isinstance(entry, dict)}
        jobs = []
        for clip_id, path in scenes.items():
            entry = dict(by_id.get(clip_id, {}))
            if args.caption is not None:
                entry["caption"] = args.caption
            jobs.append(Job(clip_id, partial(read_scene, args, clip_id, path, entry, cut), args.raw, cut, entry))
        outcomes = _convert_all(args.raw, entries, jobs, args.workers)
        shutil.rmtree(args.raw / UNFINISHED, ignore_errors=True)
    return _report(args.raw, outcomes)


def _convert_all(raw: Path, entries: list[Any], jobs: list[Job], workers: int) -> list[Outcome]:
    """Converts the clips, and brings them into the folder some at a time."""
    outcomes: list[Outcome] = []
    ready: list[Converted] = []
    committed = time.monotonic()
    with Progress(len(jobs), "clips") as progress:
        for outcome in run_parallel(_convert, jobs, workers, progress):
            outcomes.append(outcome)
            if outcome.converted is None:
                log.error(f"{outcome.clip_id}: {outcome.failure}")
                continue
            if outcome.converted.doubt:
                log.warning(f"{outcome.clip_id}: {outcome.converted.doubt}")
            ready.append(outcome.converted)
            if time.monotonic() - committed > COMMIT_EVERY_S:
                _commit(raw, entries, ready)
                ready, committed = [], time.monotonic()
    _commit(raw, entries, ready)
    return outcomes


def _commit(raw: Path, entries: list[Any], ready: list[Converted]) -> None:
    """Killed at any point, this leaves clips that are old, new, or incomplete and therefore made again."""
    for converted in ready:
        remove_replaced(raw, converted)
        _put(entries, converted.record)
    if ready:
        write_file(schema.metadata_path(raw), (json.dumps(entries, indent=1, ensure_ascii=False) + "\n").encode())
    for converted in ready:
        place(raw, converted)


def _convert(job: Job, advance: Callable[[int], None]) -> Outcome:
    torch.set_num_threads(1)
    try:
        converted = convert_clip(job.raw, job.clip_id, job.read(), job.cut, job.entry)
        return Outcome(job.clip_id, converted, "")
    except (ValueError, OSError, av.error.FFmpegError) as error:
        return Outcome(job.clip_id, None, str(error))
    finally:
        advance(1)


def _put(entries: list[Any], record: Mapping[str, Any]) -> None:
    for index, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("id") == record["id"]:
            entries[index] = dict(record)
            return
    entries.append(dict(record))


def _entries(raw: Path) -> list[Any]:
    return schema.read_metadata(raw) if schema.metadata_path(raw).is_file() else []


def _report(raw: Path, outcomes: list[Outcome]) -> int:
    done = [outcome.converted for outcome in outcomes if outcome.converted]
    failed = len(outcomes) - len(done)
    there = sum(not converted.replaces for converted in done)
    print(f"{len(done) - there} clips converted, {there} were there, {failed} failed: {raw}")
    ids = [converted.record["id"] for converted in done]
    for kind in ("depth", "points"):
        without = [clip_id for clip_id in ids if not schema.label_folder(raw, kind, clip_id).is_dir()]
        if without:
            log.warning(
                f"{len(without)} clips have no {kind} ({without[0]}{', ...' if len(without) > 1 else ''}), and `fw data pack` "
                "leaves them out; run VGGT or DUSt3R on their videos and then `fw data convert vggt` or `dust3r` (docs/labels.md)"
            )
    return 1 if failed else 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 336x592")
    return int(match[1]), int(match[2])


def _clip_size(text: str) -> tuple[int, int]:
    size = _size(text)
    if size[0] % schema.SIZE_STEP or size[1] % schema.SIZE_STEP:
        raise argparse.ArgumentTypeError(f"{text}: both sides must be multiples of {schema.SIZE_STEP}")
    return size


def _frames(text: str) -> int:
    try:
        latent_frames(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return int(text)
