"""Render synthetic clips with exact depth, points and cameras as a raw data folder.

    fw data synth data/raw --scenes 200
    fw data synth data/raw --scenes 40 --frames 81 --size 336x592 --both-orientations --workers 16
    fw data synth data/raw --scenes 40 --moving 1 --sky 0 --seed 7
    fw data synth data/raw --scenes 40 --path pan --path orbit --no-camera-words

Scenes are textured spheres and boxes on a floor, in a room, before a wall, under a painted dome or under an open sky; cameras
orbit, dolly, pan, rise or are held by hand. The folder gets `metadata.json`, `videos/ID.mp4`, `depth/ID/frame_0000.npy`
(z-depth in metres), `points/ID/frame_0000.npy` (in the first camera's frame) and `camera_params/ID.txt`; an open sky is NaN.

Scene i depends on the seed and i alone: any number of workers writes the same bytes. The same command again finishes what was
interrupted; `synth.json` in the folder keeps the arguments, and others are refused. `metadata.json` is written last.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from data_tools.paths import PATH_KINDS
from data_tools.scene_files import UNFINISHED_NAME, Settings, is_finished, metadata_record, write_scene
from data_tools.shared_folder import only_writer
from fw_train.atomic_files import clear_partial, write_file

SETTINGS_NAME, METADATA_NAME = "synth.json", "metadata.json"
SMALLEST = 16  # pixels a side
REPORT_S = 10.0  # seconds between progress lines where they cannot overwrite each other
INTERRUPTED = 130  # the exit code of shells


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
    parser.add_argument(
        "--path", action="append", choices=PATH_KINDS, help="kind of camera path (all); repeat it for several"
    )
    parser.add_argument(
        "--no-camera-words",
        action="store_true",
        help="captions do not say what the camera does: a network has to learn it from the paths",
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all processors)")


def run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: give at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    with only_writer(args.out, f"another `fw data synth` writes to {args.out}; wait for it or give another folder"):
        _agree_on_settings(args.out, settings)
        shutil.rmtree(args.out / UNFINISHED_NAME, ignore_errors=True)
        there = _finished(args.out, settings)
        if there:
            print(f"{len(there)} of {settings.scenes} scenes are there", file=sys.stderr)
        missing = [index for index in range(settings.scenes) if index not in there]
        if missing:
            (args.out / METADATA_NAME).unlink(missing_ok=True)  # it would list scenes that are not there
        try:
            records = _make_all(args.out, settings, missing, args.workers)
        except KeyboardInterrupt:
            done = len(_finished(args.out, settings))
            print(
                f"\nstopped: {done} of {settings.scenes} scenes; the same command goes on from there", file=sys.stderr
            )
            return INTERRUPTED
        records |= {index: metadata_record(settings, index) for index in there}
        shutil.rmtree(args.out / UNFINISHED_NAME, ignore_errors=True)
        _write_json(args.out / METADATA_NAME, [records[index] for index in range(settings.scenes)])
    print(f"{settings.scenes} scenes in {args.out}")
    return 0


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
    paths = tuple(dict.fromkeys(args.path or PATH_KINDS))
    return Settings(
        args.scenes,
        args.frames,
        tuple(sizes),
        args.fps,
        args.seed,
        args.moving,
        args.sky,
        paths,
        not args.no_camera_words,
    )


def _agree_on_settings(out: Path, settings: Settings) -> None:
    """Claims a new folder for these settings, or makes sure that it was begun with them."""
    path = out / SETTINGS_NAME
    wanted = json.loads(json.dumps(asdict(settings)))
    if not path.exists():
        clear_partial(out, SETTINGS_NAME)
        if any(out.iterdir()):
            raise ValueError(f"{out} has files in it but no {SETTINGS_NAME}; give a new folder")
        _write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove {out} and begin again") from None
    if found == wanted:
        return
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        raise ValueError(f"{path} does not hold the arguments of this command; give a new folder")
    differing = [
        f"{name} is {found[name]} there and {wanted[name]} here" for name in wanted if found[name] != wanted[name]
    ]
    raise ValueError(f"{out} was begun with other arguments: {'; '.join(differing)}; repeat them or give a new folder")


def _finished(out: Path, settings: Settings) -> set[int]:
    return {index for index in range(settings.scenes) if is_finished(out, settings, index)}


def _make_all(out: Path, settings: Settings, missing: list[int], workers: int) -> dict[int, dict[str, Any]]:
    """Makes the missing scenes; returns their metadata."""
    progress = _Progress(len(missing), sys.stderr)
    records = {}
    if min(workers, len(missing)) <= 1:
        for index in missing:
            records[index] = _make(out, settings, index)
            progress.advance()
        return records
    # Not forked: threads of numpy and torch do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), context, initializer=_prepare_worker) as pool:
        try:
            indices = {pool.submit(_make, out, settings, index): index for index in missing}
            for future in as_completed(indices):
                records[indices[future]] = future.result()
                progress.advance()
        except BrokenProcessPool:
            raise OSError(
                "a worker ended abruptly, perhaps for lack of memory; the same command with fewer --workers goes on"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return records


def _make(out: Path, settings: Settings, index: int) -> dict[str, Any]:
    write_scene(out, settings, index)
    return metadata_record(settings, index)


def _prepare_worker() -> None:
    """Lets a worker end at once on Ctrl-C, and as soon as the process that started it is gone, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
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


def _write_json(path: Path, value: Any) -> None:
    """Writes in one step: the file is complete or absent."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())
