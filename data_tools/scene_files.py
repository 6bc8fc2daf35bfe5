"""The files of one synthetic clip: video, depth, points, cameras, and what metadata.json says about it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.paths import PATH_KINDS, PathKind
from data_tools.scene_render import View, camera_directions, render_colour, render_labels
from data_tools.scenes import Scene, caption, sample_scene, surfaces_at, views
from fw_train.camera_files import write_cameras
from fw_train.geometry import Cameras, invert_rigid, relative_to_first
from fw_train.pictures.video_writer import video_writer

UNFINISHED_NAME = ".unfinished"  # folder of scenes in the making


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
    paths: tuple[PathKind, ...] = PATH_KINDS
    camera_words: bool = True  # captions say what the camera does

    def scene(self, index: int) -> Scene:
        return sample_scene(self.seed, index, self.moving, self.sky, self.paths)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index % len(self.sizes)]

    def scene_id(self, index: int) -> str:
        return f"synth_{self.seed}_{index:05d}"


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

    scene = settings.scene(index)
    clip = views(scene, settings.frames, settings.fps, *settings.size(index))
    first_from_cam = camera_track(clip)
    with video_writer(video, settings.fps, *settings.size(index)) as add_picture:
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
    scene = settings.scene(index)
    height, width = settings.size(index)
    return {
        "id": settings.scene_id(index),
        "caption": caption(scene, settings.frames, settings.fps, height, width, camera=settings.camera_words),
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
