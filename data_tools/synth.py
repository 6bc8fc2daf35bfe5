"""Render synthetic clips with exact depth, points and cameras as a raw data folder.

    fw data synth data/raw --scenes 200
    fw data synth data/raw --scenes 40 --frames 81 --size 336x592 --both-orientations --workers 16
    fw data synth data/raw --scenes 40 --moving 1 --sky 0 --seed 7

Scenes are textured spheres and boxes on a floor, in a room, before a wall, under a painted dome or under an open sky; cameras
orbit, dolly, pan, rise or are held by hand. The folder gets `metadata.json`, `videos/ID.mp4`, `depth/ID/frame_0000.npy`
(z-depth in metres), `points/ID/frame_0000.npy` (in the first camera's frame) and `camera_params/ID.txt`; an open sky is NaN.

Scene i depends on the seed and i alone: any number of workers writes the same bytes. The same command again finishes what was
interrupted; `synth.json` in the folder keeps the arguments, and others are refused. `metadata.json` is written last.
"""

import argparse
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import av
import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.scene_render import View, camera_directions, render_colour, render_labels
from data_tools.scenes import caption, sample_scene, surfaces_at, views
from fw_train.camera_files import write_cameras
from fw_train.geometry import Cameras, invert_rigid, relative_to_first

SETTINGS_NAME, METADATA_NAME, UNFINISHED_NAME = "synth.json", "metadata.json", ".unfinished"
CRF = "12"  # H.264 quality, visually lossless
SMALLEST = 16  # pixels a side
REPORT_S = 10.0  # seconds between progress lines where they cannot overwrite each other
INTERRUPTED = 130  # the exit code of shells


@dataclass(frozen=True)
class Settings:
    """Everything that the bytes of a folder depend on."""

    scenes: int
    frames: int
    sizes: tuple[tuple[int, int], ...]  # height, width; scene i has the (i mod n)-th
    fps: int
    seed: int
    moving: float
    sky: float

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index % len(self.sizes)]

    def scene_id(self, index: int) -> str:
        return f"synth_{self.seed}_{index:05d}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; new, or one that this command began")
    parser.add_argument("--scenes", type=int, default=100, metavar="N", help="number of clips (100)")
    parser.add_argument("--frames", type=int, default=17, metavar="T", help="frames of each clip (17)")
    parser.add_argument(
        "--size", action="append", type=_size, metavar="HxW", help="height x width (64x96); repeat it to alternate"
    )
    parser.add_argument("--both-orientations", action="store_true", help="alternate every size with its transpose")
    parser.add_argument("--fps", type=int, default=16, help="frames per second (16)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (0)")
    parser.add_argument(
        "--moving", type=float, default=0.25, metavar="FRACTION", help="probability of moving objects (0.25)"
    )
    parser.add_argument(
        "--sky", type=float, default=0.2, metavar="FRACTION", help="probability of an open sky without depth (0.2)"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all processors)")


def run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: give at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    with _only_writer(args.out, settings):
        shutil.rmtree(args.out / UNFINISHED_NAME, ignore_errors=True)
        missing = [index for index in range(settings.scenes) if not is_finished(args.out, settings, index)]
        if len(missing) < settings.scenes:
            print(f"{settings.scenes - len(missing)} of {settings.scenes} scenes are there", file=sys.stderr)
        try:
            _render_all(args.out, settings, missing, args.workers)
        except KeyboardInterrupt:
            done = sum(is_finished(args.out, settings, index) for index in range(settings.scenes))
            print(
                f"\nstopped: {done} of {settings.scenes} scenes; the same command goes on from there", file=sys.stderr
            )
            return INTERRUPTED
        shutil.rmtree(args.out / UNFINISHED_NAME, ignore_errors=True)
        records = [metadata_record(settings, index) for index in range(settings.scenes)]
        _write_json(args.out / METADATA_NAME, records)
    print(f"{settings.scenes} scenes in {args.out}")
    return 0


def is_finished(out: Path, settings: Settings, index: int) -> bool:
    """Whether all files of a scene are in place; each of its four parts arrives in one step."""
    return all((out / part).exists() for part in _parts(settings.scene_id(index)))


def write_scene(out: Path, settings: Settings, index: int) -> None:
    """Renders a scene beside its place and moves it there when it is whole."""
    scene_id = settings.scene_id(index)
    work = out / UNFINISHED_NAME / scene_id
    shutil.rmtree(work, ignore_errors=True)
    parts = _parts(scene_id)
    for part in parts:
        (work / part).parent.mkdir(parents=True, exist_ok=True)
        (out / part).parent.mkdir(exist_ok=True)
    video, depth, points, cameras = (work / part for part in parts)
    depth.mkdir()
    points.mkdir()

    scene = sample_scene(settings.seed, index, settings.moving, settings.sky)
    clip = views(scene, settings.frames, settings.fps, *settings.size(index))
    first_from_cam = camera_track(clip)
    with _video_writer(video, settings.fps, *settings.size(index)) as add_picture:
        for frame, view in enumerate(clip):
            surfaces = surfaces_at(scene, frame / max(settings.frames - 1, 1), frame / settings.fps)
            add_picture(render_colour(surfaces, scene.light, view))
            depth_m = render_labels(surfaces, view).depth_m
            np.save(depth / f"frame_{frame:04d}.npy", depth_m.astype(np.float32))
            np.save(points / f"frame_{frame:04d}.npy", points_in_first(depth_m, view, first_from_cam[frame].numpy()))
    intrinsics = torch.tensor([_intrinsics_frac(view) for view in clip], dtype=torch.float64)
    write_cameras(cameras, Cameras(invert_rigid(first_from_cam), intrinsics))

    for part in parts:
        if (out / part).is_dir():  # an earlier run was killed between two of these moves
            shutil.rmtree(out / part)
        os.replace(work / part, out / part)
    shutil.rmtree(work)


def camera_track(clip: list[View]) -> torch.Tensor:
    """Camera poses [T, 4, 4] in the first camera's frame, fp64; the first is the identity to the last bit."""
    stage_from_cam = torch.from_numpy(np.stack([view.stage_from_cam for view in clip]))
    track = relative_to_first(invert_rigid(stage_from_cam))
    track[0] = torch.eye(4, dtype=torch.float64)
    return track


def points_in_first(
    depth_m: NDArray[np.float64], view: View, first_from_cam: NDArray[np.float64]
) -> NDArray[np.float32]:
    """The points [H, W, 3] that the pixels see, in the first camera's frame; NaN where the depth is."""
    x, y, z = camera_directions(view) * depth_m
    moved = [row[0] * x + row[1] * y + row[2] * z + row[3] for row in first_from_cam[:3]]
    return np.stack(moved, axis=-1).astype(np.float32)


def metadata_record(settings: Settings, index: int) -> dict[str, Any]:
    """What metadata.json says about a scene."""
    scene = sample_scene(settings.seed, index, settings.moving, settings.sky)
    height, width = settings.size(index)
    return {
        "id": settings.scene_id(index),
        "caption": caption(scene, settings.frames, settings.fps, height, width),
        "fps": settings.fps,
        "width": width,
        "height": height,
        "depth_kind": "metric",
        "intrinsics": _intrinsics_frac(views(scene, 1, settings.fps, height, width)[0]),
    }


def _intrinsics_frac(view: View) -> list[float]:
    return [view.focal_px / view.width, view.focal_px / view.height, 0.5, 0.5]


def _parts(scene_id: str) -> tuple[str, str, str, str]:
    return f"videos/{scene_id}.mp4", f"depth/{scene_id}", f"points/{scene_id}", f"camera_params/{scene_id}.txt"


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 336x592")
    height, width = int(match[1]), int(match[2])
    if min(height, width) < SMALLEST or height % 2 or width % 2:
        raise argparse.ArgumentTypeError(f"{text}: H.264 video needs even sides, and scenes at least {SMALLEST} pixels")
    return height, width


def _settings(args: argparse.Namespace) -> Settings:
    for name, least in (("scenes", 1), ("frames", 1), ("fps", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: give at least {least}")
    for name in ("moving", "sky"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name):g} is a fraction of the scenes; give 0 to 1")
    sizes = args.size or [(64, 96)]
    if args.both_orientations:
        sizes = [turned for height, width in sizes for turned in ((height, width), (width, height))]
    return Settings(args.scenes, args.frames, tuple(sizes), args.fps, args.seed, args.moving, args.sky)


@contextmanager
def _only_writer(out: Path, settings: Settings) -> Iterator[None]:
    """Holds the folder for these settings: it is empty or has them already, and nobody else writes to it."""
    path = out / SETTINGS_NAME
    wanted = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        if any(out.iterdir()):
            raise ValueError(f"{out} has files in it but no {SETTINGS_NAME}; give a new folder")
        _write_json(path, wanted)
    with path.open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another `fw data synth` writes to {out}; wait for it or give another folder") from None
        try:
            found = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}); remove {out} and begin again") from None
        differing = [
            f"{name} is {found.get(name)} there and {value} here"
            for name, value in wanted.items()
            if found.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"{out} was begun with other arguments: {'; '.join(differing)}; repeat them or give a new folder"
            )
        yield


def _render_all(out: Path, settings: Settings, missing: list[int], workers: int) -> None:
    progress = _Progress(len(missing), sys.stderr)
    workers = min(workers, len(missing))
    if workers <= 1:
        for index in missing:
            write_scene(out, settings, index)
            progress.advance()
        return
    # Not forked: threads of numpy and torch do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        try:
            for future in as_completed([pool.submit(write_scene, out, settings, index) for index in missing]):
                future.result()
                progress.advance()
        except BaseException:
            _abandon(pool)
            raise


def _abandon(pool: Executor) -> None:
    pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Ends a worker as soon as the process that started it is gone, even killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Progress:
    """One line: scenes, scenes a second, time to go; rewritten on a terminal, repeated now and then elsewhere."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self.total, self.done, self.stream = total, 0, stream
        self.begun = self.reported = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        last = self.done == self.total
        if not self.stream.isatty() and not last and now - self.reported < REPORT_S:
            return
        self.reported = now
        rate = self.done / max(now - self.begun, 1e-9)
        left = round((self.total - self.done) / rate)
        line = f"{self.done}/{self.total} scenes, {rate:.2f}/s, {left // 60}:{left % 60:02d} to go"
        start, end = ("\r", "\n" if last else "   ") if self.stream.isatty() else ("", "\n")
        print(f"{start}{line}", end=end, file=self.stream, flush=True)


@contextmanager
def _video_writer(path: Path, fps: int, height: int, width: int) -> Iterator[Any]:
    """Takes pictures [H, W, 3] one by one; the same pictures give the same bytes."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": CRF, "preset": "medium"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1

        def add_picture(picture: NDArray[np.uint8]) -> None:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

        yield add_picture
        container.mux(stream.encode())


def _write_json(path: Path, value: Any) -> None:
    """Writes in one step: the file is complete or absent."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
