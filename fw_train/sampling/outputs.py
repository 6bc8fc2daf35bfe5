"""The files of a generated clip. The same clip gives the same bytes; a folder is complete or absent.

    video.mp4            the frames
    depth/frame_0000.png depth in 16 bits, 0 where there is none; times `depth.scale` of sample.json it is in scene scales
    depth.mp4            the same in colours, on one scale
    points.ply           points in the first camera's frame
    cameras.txt          predicted cameras, rows of 19 values
    colmap/              the same and some of the points as a COLMAP model in text
    contact_sheet.png    all of it at a glance
    sample.json          what was asked for, with which weights, and how far the predicted cameras are from the path

Axes: T frames, H x W pixels.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fw_train.camera_files import write_cameras
from fw_train.geometry import Cameras
from fw_train.pictures.colours import depth_picture, depth_scale
from fw_train.pictures.drawing import Picture, gray16_png_bytes, png_bytes
from fw_train.pictures.video_writer import video_writer
from fw_train.sampling.colmap import colmap_model
from fw_train.sampling.ply import PointCloud, ply_bytes

RECORD = "sample.json"
MOST_DEPTH = 65_535  # of 16 bits
COLMAP_POINTS = 20_000


class Clip(NamedTuple):
    """A generated clip; lengths in scene scales, in the first camera's frame."""

    frames: NDArray[np.uint8]  # [T, H, W, 3]
    depth: NDArray[np.float32]  # [T, H, W]
    cloud: PointCloud
    cameras: Cameras
    sheet: Picture
    fps: Fraction
    record: dict[str, Any]  # of sample.json, beside what the files themselves decide


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that takes its place once it is complete; the only thing it replaces is an earlier sample."""
    path = path.resolve()
    if path.exists() and not (path / RECORD).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and holds no earlier sample ({RECORD}); give another --output")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_clip(folder: Path, clip: Clip) -> None:
    """All files of a clip, into an empty folder."""
    _write_video(folder / "video.mp4", list(clip.frames), clip.fps)
    unit = _write_depth(folder, clip)
    (folder / "points.ply").write_bytes(ply_bytes(clip.cloud))
    write_cameras(folder / "cameras.txt", clip.cameras)
    _write_colmap(folder / "colmap", clip)
    (folder / "contact_sheet.png").write_bytes(png_bytes(clip.sheet))
    record = {
        **clip.record,
        "depth": {"scale": unit, "unit": "scene scales", "invalid": 0},
        "points": {"count": len(clip.cloud.points), "unit": "scene scales", "frame": "first camera"},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def depth_steps(depth: NDArray[np.float32], known: NDArray[np.bool_]) -> tuple[NDArray[np.uint16], float]:
    """Depth [T, H, W] as whole numbers, 0 where it is not known, and the depth that one of them stands for."""
    unit = float(depth[known].max()) / MOST_DEPTH if known.any() else 1.0
    steps = np.rint(np.where(known, depth, 0).astype(np.float64) / unit).clip(1, MOST_DEPTH)
    return np.where(known, steps, 0).astype(np.uint16), unit


def _write_depth(folder: Path, clip: Clip) -> float:
    known = np.isfinite(clip.depth) & (clip.depth > 0)
    steps, unit = depth_steps(clip.depth, known)
    (folder / "depth").mkdir()
    for number, values in enumerate(steps):
        (folder / "depth" / f"{_frame_name(number)}.png").write_bytes(gray16_png_bytes(values))
    scale = depth_scale(clip.depth, known)
    pictures = [depth_picture(depth, mask, scale) for depth, mask in zip(clip.depth, known, strict=True)]
    _write_video(folder / "depth.mp4", pictures, clip.fps)
    return unit


def _write_colmap(folder: Path, clip: Clip) -> None:
    height, width = clip.frames.shape[1:3]
    few = slice(None, None, max(1, -(-len(clip.cloud.points) // COLMAP_POINTS)))
    cloud = PointCloud(clip.cloud.points[few], clip.cloud.colours[few], clip.cloud.confidence[few])
    names = [f"{_frame_name(number)}.png" for number in range(len(clip.frames))]
    model = colmap_model(clip.cameras, (height, width), names, cloud)
    folder.mkdir()
    for name, data in zip(("cameras", "images", "points3D"), model, strict=True):
        (folder / f"{name}.txt").write_bytes(data)


def _write_video(path: Path, pictures: list[Picture], fps: Fraction) -> None:
    height, width = pictures[0].shape[:2]
    with video_writer(path, fps, height, width) as add_picture:
        for picture in pictures:
            add_picture(picture)


def _frame_name(number: int) -> str:
    return f"frame_{number:04}"
