"""Where the clips of a path are, and which reader takes them."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.convert_clip import Cut, Source
from data_tools.convert_colmap import read_colmap
from data_tools.convert_labels import for_raw_clip, read_depth_anything, read_dust3r, read_vggt
from data_tools.convert_nerfstudio import FILE, read_nerfstudio
from data_tools.convert_re10k import read_re10k
from data_tools.pack_sample import read_clip_cameras
from data_tools.pictures import VIDEO_SUFFIXES, open_pictures
from fw_train.data import schema

PREDICTIONS = "predictions"  # a file of this name is called after its folder


def find_scenes(source: str, path: Path) -> dict[str, Path]:
    """The clips of a path by their ids, in order."""
    if not path.exists():
        raise ValueError(f"no {path}")
    path = path.absolute()
    if source == "re10k":
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        what = "camera files (*.txt)"
    elif source == "colmap":
        found, what = _folders(path, ("sparse", "cameras.bin", "cameras.txt")), "folders with sparse/"
    elif source == "nerfstudio":
        found, what = [path] if path.is_file() else _folders(path, (FILE,)), f"folders with {FILE}"
    else:
        found, what = _label_files(path, source), "npz or npy files"
    if not found:
        raise ValueError(f"{path} holds no {what}")
    scenes: dict[str, Path] = {}
    for scene in found:
        clip_id = _name(scene)
        if clip_id in scenes:
            raise ValueError(f"{scenes[clip_id]} and {scene} would both be the clip {clip_id}; rename one")
        scenes[clip_id] = scene
    return scenes


def _folders(path: Path, marks: tuple[str, ...]) -> list[Path]:
    """The folder itself if it has one of the names in it, else those within it that have."""
    for folders in ([path], sorted(path.iterdir()) if path.is_dir() else []):
        found = [folder for folder in folders if any((folder / mark).exists() for mark in marks)]
        if found:
            return found
    return []


def _label_files(path: Path, source: str) -> list[Path]:
    """A file, a folder whose npy files are one clip, or all clips of a folder."""
    if path.is_file():
        return [path]
    inner = sorted(path.iterdir())
    archives = [file for file in inner if file.suffix == ".npz" or (file.is_dir() and _label_files(file, source))]
    arrays = [file for file in inner if file.suffix == ".npy"]
    if source == "depth-anything" and arrays and _frames_in(arrays[0]) > 1:
        return sorted(archives + arrays)
    return archives if archives else [path] if arrays else []


def _frames_in(path: Path) -> int:
    """How many frames of depth an npy file holds, by its header."""
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (ValueError, EOFError):
        return 1  # the reader says what is wrong with it
    return shape[0] if len(shape) > 2 else 1


def _name(scene: Path) -> str:
    if scene.is_dir():
        return scene.name
    return scene.parent.name if scene.stem == PREDICTIONS or scene.name == FILE else scene.stem


def read_scene(args: argparse.Namespace, clip_id: str, path: Path, entry: dict[str, Any], cut: Cut) -> Source:
    """The clip of a path by the source's own reader; `entry` is what metadata.json says about it so far."""
    if args.source == "re10k":
        return read_re10k(path, args.pictures, args.original_size)
    if args.source == "colmap":
        return read_colmap(path, args.images)
    if args.source == "nerfstudio":
        return read_nerfstudio(path)
    video = schema.video_path(args.raw, clip_id)
    if args.source == "depth-anything":
        if not entry or not video.is_file():
            raise ValueError(
                f"{args.raw} has no clip {clip_id}; convert its video and cameras first (re10k, colmap, nerfstudio, vggt, dust3r), "
                f"run Depth Anything on {schema.video_path(args.raw, 'ID')} and name its result by the same ID, or give --id"
            )
        cameras = read_clip_cameras(args.raw, schema.read_clip(entry, clip_id))
        file = schema.camera_path(args.raw, clip_id)
        return read_depth_anything(path, open_pictures(video), cameras, args.depth_kind, file)
    read = read_vggt if args.source == "vggt" else read_dust3r
    pictures = _pictures_of(args.video, clip_id, path)
    if pictures is None and entry and video.is_file():
        if cut != Cut():
            raise ValueError(
                f"{video} is there and stays as it is; --size, --start, --frames, --stride, --fps need --video"
            )
        return for_raw_clip(read(path, open_pictures(video), args.fit, args.min_confidence))
    if pictures is None:
        raise ValueError(
            f"no frames for {path}: give --video, or the folder {path.parent / 'images'}, or convert the clip {clip_id} first"
        )
    return read(path, open_pictures(pictures), args.fit, args.min_confidence)


def _pictures_of(video: Path | None, clip_id: str, labels: Path) -> Path | None:
    """What the network saw, as far as it is not the clip's video in the raw folder."""
    if video is None:
        beside = labels.parent / "images"
        return beside if beside.is_dir() else None
    for name in (clip_id, *(f"{clip_id}{suffix}" for suffix in VIDEO_SUFFIXES)):
        if video.is_dir() and (video / name).exists():
            return video / name
    return video
