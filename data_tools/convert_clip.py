"""One clip of another tool's, cut, cropped and resized, to the files of a raw folder.

Axes: T frames, H x W pixels; h x w pixels of a label array, which may be fewer.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.framing import Framing, Region, centred, frame_intrinsics, frame_labels, frame_picture, unchanged
from data_tools.pictures import Pictures, choose, read_pictures
from data_tools.pose_check import DOUBTFUL, LOOKED_AT, LOOKED_AT_PX, check_poses
from fw_train.batch import DepthKind
from fw_train.camera_files import write_cameras
from fw_train.data import schema
from fw_train.geometry import Cameras, intrinsics_px, invert_rigid, rigid, transform_points, unproject
from fw_train.pictures.video_writer import video_writer

UNFINISHED = ".unfinished"  # folder of clips in the making
PARTS = ("video", "depth", "points", "cameras")
DEFAULT_FPS = Fraction(24)
FORMAT = 1  # of what this writes; another number converts finished clips again
ROTATION_TOLERANCE = 2e-2  # from orthonormal: networks that compute in half precision are off by nearly that

Labels = Callable[[int], NDArray[Any]]  # of one frame


@dataclass(frozen=True)
class Source:
    """A clip as another tool left it. `cameras` and labels have a frame for each of the pictures."""

    pictures: Pictures
    cameras: Cameras  # fractions of the pictures
    depth: Labels | None = None  # [h, w]
    points: Labels | None = None  # [h, w, 3], in the world of the cameras
    region: Region | None = None  # what the labels cover; None: all
    depth_kind: DepthKind = "metric"
    gaps: Mapping[int, str] = field(default_factory=dict)  # frames that cannot be used, and why
    inputs: tuple[Path, ...] = ()  # files that it was read from, beside the pictures
    settings: str = ""  # of the reader, which labels depend on
    origin: str = ""
    fps: Fraction | None = None
    replaces: frozenset[str] = frozenset(PARTS)  # without "video": labels for a clip that is in the raw folder


class Cut(NamedTuple):
    """What is taken from a source."""

    size: tuple[int, int] | None = None  # height, width
    start: int = 0
    frames: int | None = None
    stride: int = 1
    fps: Fraction | None = None  # of sources that have none


class Converted(NamedTuple):
    """A clip whose new files lie in `UNFINISHED`, complete; `place` brings them in."""

    record: dict[str, Any]  # the clip's entry in metadata.json
    replaces: frozenset[str]  # parts whose old files go; none: the clip was there
    made: tuple[str, ...]  # parts that come
    doubt: str  # what is odd about the labels; empty if nothing is


def rotations(poses: NDArray[Any], where: Path, names: tuple[str, ...]) -> torch.Tensor:
    """Rigid transforms [T, 4, 4], fp64, from matrices [T, 3 or 4, 4] of few digits; others are refused."""
    table = torch.from_numpy(np.asarray(poses, dtype=np.float64))
    rotation = table[:, :3, :3]
    off = (rotation @ rotation.mT - torch.eye(3, dtype=table.dtype)).abs().amax(dim=(-1, -2))
    wrong = ~(off <= ROTATION_TOLERANCE) | (torch.linalg.det(rotation) < 0) | ~table[:, :3].isfinite().all(dim=(-1, -2))
    if table.shape[1] == 4:
        sideways = (table[:, 3] - torch.tensor([0.0, 0, 0, 1])).abs().amax(-1) > 1e-6
        if sideways.any():
            index = int(sideways.nonzero()[0])
            raise ValueError(
                f"{where}, {names[index]}: the last row of its matrix is {table[index, 3].tolist()}, not [0, 0, 0, 1]; "
                "is it transposed?"
            )
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{where}, {names[index]}: the 3x3 part of its matrix is no rotation (determinant "
            f"{torch.linalg.det(rotation[index]):.4f}, {off[index]:.1e} from orthonormal); a mirrored axis gives determinant -1, "
            "a scaled scene columns longer than 1"
        )
    u, _, vt = torch.linalg.svd(rotation)
    nearest = torch.where((off > 1e-12)[:, None, None], u @ vt, rotation)
    return rigid(nearest, table[:, :3, 3])


def convert_clip(raw: Path, clip_id: str, source: Source, cut: Cut, entry: Mapping[str, Any]) -> Converted:
    """Makes a clip's files in `UNFINISHED` unless it is there; `entry` is what metadata.json says about it so far."""
    if not schema.KEY.fullmatch(clip_id):
        raise ValueError(f"{clip_id!r:.100} cannot be an id; give it a name of 1 to 80 letters, digits, - and _")
    in_place = "video" not in source.replaces
    numbers = _frames(source, cut)
    size = source.pictures.height, source.pictures.width
    framing = unchanged(*size) if in_place else centred(size, cut.size, source.region)
    fps = (source.fps or source.pictures.fps or cut.fps or DEFAULT_FPS) / cut.stride
    pictures = choose(source.pictures, numbers)
    fingerprint = _fingerprint(source, pictures, framing, numbers, fps)
    record: dict[str, Any] = {"depth_kind": source.depth_kind, "labels_from": fingerprint}
    if not in_place:
        record = {
            "id": clip_id,
            "caption": entry.get("caption", ""),
            "fps": float(fps),
            "width": framing.size[1],
            "height": framing.size[0],
            "depth_kind": source.depth_kind,
            "frames": len(numbers),
            "source": source.origin,
            "converted_from": fingerprint,
        }
    parts, made = part_paths(clip_id), _made(source)
    mark = "labels_from" if in_place else "converted_from"
    if entry.get(mark) == fingerprint and all((raw / parts[name]).exists() for name in made):
        return Converted(dict(entry), frozenset(), (), "")
    intrinsics = frame_intrinsics(source.cameras.intrinsics_frac[numbers], framing)
    cameras = Cameras(source.cameras.cam_from_world[numbers], intrinsics)
    doubt = _doubt(source, numbers, framing, cameras)

    work = raw / UNFINISHED / clip_id
    shutil.rmtree(work, ignore_errors=True)
    for name in made:
        (work / parts[name]).parent.mkdir(parents=True, exist_ok=True)
    if "video" in made:
        with video_writer(work / parts["video"], fps, *framing.size) as add_picture:
            for picture in read_pictures(pictures):
                add_picture(frame_picture(picture, framing))
    if "cameras" in made:
        write_cameras(work / parts["cameras"], cameras)
    _write_labels(work, parts, source, numbers, framing, cameras)
    kept = dict(entry) if in_place else {}
    if "cameras" in made:  # fractions refer to the clip's own frames now
        kept = {name: value for name, value in kept.items() if name not in ("original_width", "original_height")}
    return Converted({**kept, **record}, source.replaces, made, doubt)


def remove_replaced(raw: Path, converted: Converted) -> None:
    """Takes the old parts of a clip away: without them it is incomplete, and nobody takes it for the old one or the new."""
    for name, part in part_paths(converted.record["id"]).items():
        old = raw / part
        if name in converted.replaces and old.is_dir():
            shutil.rmtree(old)
        elif name in converted.replaces:
            old.unlink(missing_ok=True)


def place(raw: Path, converted: Converted) -> None:
    """Brings the new parts of a clip to their places."""
    parts = part_paths(converted.record["id"])
    for name in converted.made:
        (raw / parts[name]).parent.mkdir(parents=True, exist_ok=True)
        os.replace(raw / UNFINISHED / converted.record["id"] / parts[name], raw / parts[name])


def part_paths(clip_id: str) -> dict[str, str]:
    """Where a clip's files lie below a raw folder."""
    return {
        "video": f"videos/{clip_id}.mp4",
        "depth": f"depth/{clip_id}",
        "points": f"points/{clip_id}",
        "cameras": f"camera_params/{clip_id}.txt",
    }


def _frames(source: Source, cut: Cut) -> list[int]:
    """The numbers of the frames to take: 4k + 1 of them, all usable."""
    there = len(source.pictures.names)
    numbers = list(range(cut.start, there, cut.stride))
    if cut.frames is None:
        numbers = numbers[: max(0, len(numbers) - 1) // 4 * 4 + 1] if "video" in source.replaces else numbers
    elif len(numbers) < cut.frames:
        raise ValueError(
            f"{there} frames give {len(numbers)} from --start {cut.start} in steps of {cut.stride}; --frames asks for {cut.frames}"
        )
    numbers = numbers[: cut.frames]
    if not numbers:
        raise ValueError(f"{there} frames, so none from --start {cut.start} on")
    bad = [number for number in numbers if number in source.gaps]
    if bad:
        first, last = _longest_run(there, source.gaps)
        raise ValueError(
            f"frame {bad[0]} ({source.pictures.names[bad[0]]}) cannot be used: {source.gaps[bad[0]]}"
            f"{f', nor can {len(bad) - 1} more' if len(bad) > 1 else ''}; the longest part without gaps is "
            f"--start {first} --frames {(last - first) // 4 * 4 + 1}"
        )
    return numbers


def _longest_run(there: int, gaps: Mapping[int, str]) -> tuple[int, int]:
    """The first and last number of the longest part of a clip without gaps."""
    fences = [-1, *sorted(gaps), there]
    before, after = max(pairwise(fences), key=lambda pair: pair[1] - pair[0])
    return before + 1, after - 1


def _made(source: Source) -> tuple[str, ...]:
    """The parts that the source gives."""
    depth = source.depth is not None or source.points is not None
    points = source.points is not None or (depth and source.depth_kind == "metric")
    there = {"video": True, "depth": depth, "points": points, "cameras": True}
    return tuple(name for name in PARTS if there[name] and name in source.replaces)


def _write_labels(
    work: Path, parts: Mapping[str, str], source: Source, numbers: list[int], framing: Framing, cameras: Cameras
) -> None:
    made = _made(source)
    folders = {name: work / parts[name] for name in ("depth", "points") if name in made}
    for folder in folders.values():
        folder.mkdir(parents=True)
    first_from_world = cameras.cam_from_world[0]
    intrinsics = intrinsics_px(cameras.intrinsics_frac, *framing.size)
    for t, number in enumerate(numbers if folders else []):
        points = depth = None
        cam_from_world = cameras.cam_from_world[t]
        if source.points is not None:
            taken = frame_labels(source.points(number), source.region, framing)
            points = torch.from_numpy(taken).double().movedim(-1, 0)
        if source.depth is not None:
            depth = torch.from_numpy(frame_labels(source.depth(number), source.region, framing)).double()
        elif points is not None:
            depth = transform_points(cam_from_world, points)[2]
        assert depth is not None
        depth = torch.where((depth > 0) & depth.isfinite(), depth, torch.nan)
        if "depth" in folders:
            np.save(folders["depth"] / f"frame_{t:04}.npy", depth.float().numpy())
        if "points" in folders:
            if points is None:
                seen = unproject(depth, intrinsics[t], first_from_world @ invert_rigid(cam_from_world))
            else:
                seen = transform_points(first_from_world, points)
            np.save(folders["points"] / f"frame_{t:04}.npy", seen.movedim(0, -1).float().contiguous().numpy())


def _doubt(source: Source, numbers: list[int], framing: Framing, cameras: Cameras) -> str:
    """Refuses poses of another convention, as far as depth shows them; says where depth and cameras do not fit otherwise."""
    if source.depth is None or source.depth_kind != "metric":
        return ""
    fine = max(1, max(framing.size) // LOOKED_AT_PX)
    framing = framing._replace(size=(framing.size[0] // fine, framing.size[1] // fine))
    looked_at = sorted({round(i * (len(numbers) - 1) / (LOOKED_AT - 1)) for i in range(LOOKED_AT)})
    framed = [frame_labels(source.depth(numbers[t]), source.region, framing) for t in looked_at]
    depth = torch.from_numpy(np.stack(framed)).double()
    depth = torch.where((depth > 0) & depth.isfinite(), depth, torch.nan)
    pixels = intrinsics_px(cameras.intrinsics_frac[looked_at], *framing.size)
    check = check_poses(depth, pixels, cameras.cam_from_world[looked_at])
    if check.better:
        raise ValueError(
            f"from frame to frame the depth differs by {check.error:.1%} with these cameras, and by {check.better_error:.1%} if "
            f"their poses are {check.better}; write them in the convention of the source's format"
        )
    if check.scale != 1:
        fits = f"if the depth is about {check.scale:.2g} times as large"
        return f"depth and cameras fit together {fits}; bring them to the same units"
    if check.error > DOUBTFUL:
        return f"from frame to frame the depth differs by {check.error:.0%} (median); do depth and cameras belong together?"
    return ""


def _fingerprint(source: Source, pictures: Pictures, framing: Framing, numbers: list[int], fps: Fraction) -> str:
    """Changes with the settings and with any file that the clip is made from, by its size and time."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in (*pictures.files, *source.inputs)]
    table = torch.cat((source.cameras.cam_from_world.flatten(1), source.cameras.intrinsics_frac), dim=1)
    facts = [
        FORMAT,
        source.settings,
        table.tolist(),
        framing,
        source.region,
        numbers,
        str(fps),
        source.depth_kind,
        source.origin,
        sorted(source.replaces),
    ]
    return hashlib.sha256(json.dumps([facts, files]).encode()).hexdigest()[:32]
