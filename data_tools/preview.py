"""Draw a sample of a packed dataset: video, depth, normals and the camera's path, as a PNG.

    fw data preview packed/ clip_0001 --png clip_0001.png

Depth is bright where near, with one scale for the whole clip; normals are red to the right, green up, blue towards the
camera; grey checks mark pixels without a label. The path is seen from above, with the first camera in a white ring.
"""

import argparse
import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from data_tools import normals
from fw_train.atomic_files import write_file
from fw_train.data.codec import decode_depth, decode_points
from fw_train.data.manifest import Dataset
from fw_train.data.schema import CAMERA, DEPTH, INFO, POINTS, VIDEO, SampleInfo, parse_cameras, parse_info
from fw_train.data.shards import ShardError
from fw_train.data.strict_json import SchemaError
from fw_train.geometry import relative_to_first
from fw_train.pictures import camera_path, colours, drawing

FRAMES = 4
NEAREST = 3  # keys that an error names
LOOKED_AT = 1000  # keys that are compared closely, of any number
SMALLEST_PATH = 0.02  # scene scales; below this a path is drawn smaller than the picture


class Preview(NamedTuple):
    """What is drawn of a sample; the chosen frames are N of T."""

    info: SampleInfo
    chosen: tuple[int, ...]
    video: NDArray[np.uint8]  # [N, H, W, 3]
    depth: drawing.Float  # [T, H, W]
    depth_valid: drawing.Mask  # [T, H, W]
    points: drawing.Float  # [N, H, W, 3]
    points_valid: drawing.Mask  # [N, H, W]
    first_from_cam: NDArray[np.float64]  # [T, 4, 4]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that `fw data pack` wrote")
    parser.add_argument("key", metavar="KEY", nargs="?", help="of the sample (default: the first sample)")
    parser.add_argument("--png", metavar="FILE", type=Path, help="where to write (default: KEY.png)")
    parser.add_argument("--frames", type=_count, default=FRAMES, metavar="N", help=f"rows to draw (default {FRAMES})")


def run(args: argparse.Namespace) -> int:
    dataset = Dataset(args.out)
    try:
        row = 0 if args.key is None else find_row(dataset, args.key)
        preview = read_preview(dataset, row, args.frames)
    finally:
        dataset.close()
    path = args.png or Path(f"{preview.info.key}.png")
    write_file(path, drawing.png_bytes(draw(preview)))
    print(path)
    return 0


def find_row(dataset: Dataset, key: str) -> int:
    """The row of a key; the error for an unknown one names those nearest to it."""
    keys = dataset.keys()
    rows = np.flatnonzero(keys == key.encode())
    if len(rows):
        return int(rows[0])
    near = ", ".join(nearest_keys(keys, key))
    raise ShardError(f"{dataset.folder} has no sample {key!r:.100}; the nearest of its {len(keys)} keys: {near}")


def nearest_keys(keys: NDArray[np.bytes_], key: str) -> list[str]:
    """The keys most like `key`, best first."""
    keys, wanted = np.ascontiguousarray(keys), np.array([key.encode()], keys.dtype)
    # Comparing closely takes minutes for a million keys, counting the letters that they begin and end with in common a moment.
    ends = (np.strings.rjust(names, keys.dtype.itemsize) for names in (keys, wanted))
    common = _common_prefix(_letters(keys), _letters(wanted))
    common += _common_prefix(*(_letters(names)[:, ::-1] for names in ends))
    likely = np.argsort(-common, kind="stable")[:LOOKED_AT]
    names = [keys[row].decode() for row in likely]
    return sorted(names, key=lambda name: (-difflib.SequenceMatcher(None, name, key).ratio(), name))[:NEAREST]


def even_frames(frames: int, count: int) -> tuple[int, ...]:
    """At most `count` of a clip's frames, evenly apart, the first and the last among them."""
    return tuple(np.linspace(0, frames - 1, min(count, frames)).round().astype(int).tolist())


def read_preview(dataset: Dataset, row: int, count: int) -> Preview:
    """Reads and decodes what is drawn of a sample, `count` frames of it."""
    sample = dataset.sample(row)
    where = f"{dataset.folder / sample.shard}.tar: {sample.key}"
    members = dataset.read(row)
    info = parse_info(members[INFO], f"{where}.{INFO}")
    chosen = even_frames(info.frames, count)
    cameras = parse_cameras(members[CAMERA], info.frames, f"{where}.{CAMERA}")
    video = video_pictures(members[VIDEO], chosen, f"{where}.{VIDEO}")
    depth, points = decode_depth(members[DEPTH]), decode_points(members[POINTS], chosen)
    size = info.height, info.width
    if not (depth[0].shape == (info.frames, *size) and points[1].shape == video.shape[:3] == (len(chosen), *size)):
        raise SchemaError(
            f"{where}: video {video.shape[1:3]}, depth {depth[0].shape} and points {points[1].shape[1:]} are not all "
            f"of the size {size} that its {INFO} states; `fw data verify` checks all samples"
        )
    return Preview(info, chosen, video, *depth, *points, relative_to_first(cameras.cam_from_world).numpy())


def video_pictures(data: bytes, chosen: Sequence[int], where: str) -> NDArray[np.uint8]:
    """Frames [N, H, W, 3] of an mp4 by their ascending numbers, as displayed."""
    pictures: list[NDArray[np.uint8]] = []
    try:
        with av.open(io.BytesIO(data), mode="r", format="mp4") as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number == chosen[len(pictures)]:
                    pictures.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
                if len(pictures) == len(chosen):
                    return np.stack(pictures)
    except av.error.FFmpegError as error:
        raise SchemaError(f"{where} cannot be decoded: {error}") from None
    raise SchemaError(f"{where} ends before frame {chosen[len(pictures)]}; pack the clip again")


def smallest_shown(paths: Sequence[camera_path.CameraPath], scene_scale: float) -> float:
    """The length that paths are shown at least as large as: else cameras that rise would seem to rush along the ground."""
    rises = [highest - lowest for lowest, highest in map(camera_path.heights, paths)]
    return max(SMALLEST_PATH * scene_scale, *rises)


def length_text(path: camera_path.CameraPath) -> str:
    """The length along the path, height included."""
    return f"{np.linalg.norm(np.diff(path.centres, axis=0), axis=1).sum().round(6):.3g}"


def height_text(path: camera_path.CameraPath) -> str:
    """What the view from above does not show."""
    lowest, highest = (round(height, 3) + 0.0 for height in camera_path.heights(path))  # no -0
    return f"{lowest:g} to {highest:g}"


def unit_of(info: SampleInfo) -> str:
    """What follows a length of the clip."""
    return " m" if info.depth_kind == "metric" else ""


def draw(preview: Preview) -> drawing.Picture:
    """The whole sheet."""
    scale = colours.depth_scale(preview.depth, preview.depth_valid)
    rows = [
        drawing.beside([drawing.labelled(panel) for panel in _row(preview, n, scale)])
        for n in range(len(preview.chosen))
    ]
    panel_width = (rows[0].shape[1] - 2 * drawing.MARGIN) // 3
    unit = unit_of(preview.info)
    legends = [
        drawing.blank(1, panel_width),
        colours.depth_legend(scale, panel_width, unit),
        drawing.text_picture(["red right, green up,", "blue to the camera"], panel_width, drawing.SMALL, drawing.FAINT),
    ]
    body = drawing.beside(
        [drawing.below([*rows, drawing.beside(legends)]), _path(preview, max(panel_width, drawing.NARROW))]
    )
    return drawing.framed(drawing.below([*_title(preview.info, body.shape[1]), body]))


def _row(preview: Preview, number: int, scale: colours.DepthScale) -> list[drawing.Panel]:
    """Video, depth and normals of a chosen frame."""
    frame = preview.chosen[number]
    valid = preview.depth_valid[frame]
    cam_from_first = np.linalg.inv(preview.first_from_cam[frame])
    directions = normals.surface_normals(preview.points[number], preview.points_valid[number], cam_from_first)
    return [
        drawing.Panel(f"frame {frame}", drawing.fit(preview.video[number])),
        drawing.Panel(
            f"depth, {valid.mean():.1%} valid", drawing.fit(colours.depth_picture(preview.depth[frame], valid, scale))
        ),
        drawing.Panel("normals of the points", drawing.fit(normals.normal_picture(*directions))),
    ]


def _path(preview: Preview, size: int) -> drawing.Picture:
    """The camera's path and what it says in numbers."""
    paths, unit = [camera_path.path_of_poses(preview.first_from_cam)], unit_of(preview.info)
    smallest = smallest_shown(paths, preview.info.scene_scale)
    picture = camera_path.path_picture(paths, preview.chosen, size, smallest)
    step = camera_path.grid_step(paths, size, smallest)
    lines = [
        "x to the right, z up",
        f"grid {step:g}{unit}",
        f"path length {length_text(paths[0])}{unit}",
        f"height {height_text(paths[0])}{unit}",
        "ring: first camera",
    ]
    panel = drawing.labelled(drawing.Panel("camera from above", picture))
    return drawing.below([panel, drawing.text_picture(lines, size, drawing.SMALL, drawing.FAINT)], drawing.MARGIN // 2)


def _title(info: SampleInfo, width: int) -> list[drawing.Picture]:
    facts = (
        f"{info.height}x{info.width} (height x width), {info.frames} frames at {info.fps:g} fps, depth {info.depth_kind}, "
        f"scene scale {info.scene_scale:.4g}{unit_of(info)}" + (f", source {info.source}" if info.source else "")
    )
    styles = (
        (info.key, drawing.LARGE, 2, drawing.WHITE),
        (info.caption or "(no caption)", drawing.SMALL, 3, drawing.WHITE),
    )
    return [
        drawing.text_picture(drawing.wrap(text, width, scale, lines), width, scale, colour)
        for text, scale, lines, colour in (*styles, (facts, drawing.SMALL, 3, drawing.FAINT))
    ]


def _letters(names: NDArray[np.bytes_]) -> NDArray[np.uint8]:
    return names.view(np.uint8).reshape(len(names), -1)


def _common_prefix(letters: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many letters each row [N, L] begins with as `wanted` [1, L] does."""
    return np.logical_and.accumulate(letters == wanted, axis=1).sum(axis=1)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not at least 1")
    return count
