"""What a clip is made of: the raw folder it comes from, the tar members it becomes, and the facts beside them.

Raw folder, one entry of `metadata.json` (a list) for each clip:

    {id, caption, fps, width, height, depth_kind[, intrinsics, frames, source, original_width, original_height]}
    videos/<id>.mp4 | depth/<id>/frame_0000.npy [H, W] | points/<id>/frame_0000.npy [H, W, 3] | camera_params/<id>.txt

Points are in the first camera's frame. Axes: T frames, H x W pixels.
"""

import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray

from fw_train.batch import DepthKind, latent_frames
from fw_train.data.codec_format import PresetName
from fw_train.data.strict_json import SchemaError, read_json, read_record
from fw_train.geometry import Cameras, rigid

VERSION = 1

CAMERA, DEPTH, INFO, VIDEO, POINTS = "camera.npy", "depth.geo", "json", "mp4", "points.geo"
SUFFIXES = (CAMERA, DEPTH, INFO, VIDEO, POINTS)  # sorted, as in the tar
# Members of tars of the same names in other folders: what encoders made of the sample.
SIDECAR_SUFFIXES = ("clip.safetensors", "image.safetensors", "latent.safetensors", "text.safetensors")
KEY_LENGTH = 80  # with the longest suffix a name fits a plain tar header
KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{KEY_LENGTH}}}")
SIZE_STEP = 16  # pixels per token: the VAE's 8 times the patch's 2

_URL = re.compile(r"(pipe|file):|[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # as a path shows it, with one slash of two
_FRAME_FILE = re.compile(r"frame_(\d{4,})\.npy")
_FLOATS = tuple(np.dtype(name) for name in ("<f2", "<f4", "<f8"))
_BUCKET = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})x([1-9]\d{0,5})")


class Bucket(NamedTuple):
    """Samples that may share a batch."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        match = _BUCKET.fullmatch(text)
        if not match:
            raise SchemaError(f"{text!r} is no bucket; buckets are named height x width x frames, as 336x592x81")
        return cls(*map(int, match.groups()))

    def check(self) -> None:
        """Refuses what the network cannot take."""
        if self.height % SIZE_STEP or self.width % SIZE_STEP:
            near = [max(1, side // SIZE_STEP) * SIZE_STEP for side in (self.height, self.width)]
            raise SchemaError(
                f"{self.height}x{self.width} pixels (height x width) are not multiples of {SIZE_STEP}; "
                f"crop or resize video and labels to {near[0]}x{near[1]}"
            )
        try:
            latent_frames(self.frames)
        except ValueError as error:
            raise SchemaError(f"{error} (`--frames` cuts clips to their first frames)") from None


@dataclass(frozen=True)
class RawClip:
    """An entry of `metadata.json`."""

    id: str
    caption: str
    fps: float
    width: int
    height: int
    depth_kind: DepthKind
    intrinsics: tuple[float, ...] | None = None  # fx, fy, cx, cy as fractions, for camera files without them
    frames: int | None = None
    source: str = ""
    original_width: int | None = None  # of the frames that the fractions refer to, where these were cropped from them
    original_height: int | None = None

    @property
    def original_size(self) -> tuple[int, int] | None:
        if self.original_height is None or self.original_width is None:
            return None
        return self.original_height, self.original_width


@dataclass(frozen=True)
class LabelInfo:
    """How a label array was encoded; the error was measured by decoding it again."""

    codec: str
    preset: PresetName
    max_rel_error: float
    raw_bytes: int
    encoded_bytes: int
    lossless_frames: int
    valid_fraction: float


@dataclass(frozen=True)
class SampleInfo:
    """The sample's `json` member. The video may go on after the first `frames` frames, which alone have labels."""

    schema: int
    key: str
    caption: str
    fps: float
    height: int
    width: int
    frames: int
    video_frames: int
    depth_kind: DepthKind
    scene_scale: float  # mean distance of the valid points to the first camera
    source: str
    depth: LabelInfo
    points: LabelInfo

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.height, self.width, self.frames)


class VideoFacts(NamedTuple):
    """What decoding a video gave; sizes as displayed, so with its rotation applied."""

    frames: int
    height: int
    width: int


class NpyHeader(NamedTuple):
    """What an npy file declares before its numbers."""

    shape: tuple[int, ...]
    column_major: bool
    dtype: np.dtype[Any]
    length: int  # of the header itself, in bytes

    def array(self, data: bytes | bytearray) -> NDArray[Any]:
        """A view of the file's bytes."""
        values = np.frombuffer(data, self.dtype, math.prod(self.shape), self.length)
        return values.reshape(self.shape, order="F" if self.column_major else "C")


def read_clip(document: object, where: str) -> RawClip:
    """A metadata entry, checked; names that the schema does not know are left aside."""
    if isinstance(document, dict):
        document = {name: value for name, value in document.items() if name in RawClip.__dataclass_fields__}
    clip = read_record(RawClip, document, where)
    if not KEY.fullmatch(clip.id):
        raise SchemaError(
            f"{where}: the id {clip.id!r:.100} cannot name tar members; use 1 to {KEY_LENGTH} letters, digits, - and _"
        )
    if not (clip.fps > 0 and clip.width > 0 and clip.height > 0 and (clip.frames is None or clip.frames > 0)):
        raise SchemaError(
            f"{where}: fps {clip.fps}, size {clip.width}x{clip.height}, frames {clip.frames}: not positive"
        )
    if clip.intrinsics is not None and len(clip.intrinsics) != 4:
        raise SchemaError(f"{where}: intrinsics {list(clip.intrinsics)} are not [fx, fy, cx, cy]")
    sides = clip.original_width, clip.original_height
    if (sides[0] is None) != (sides[1] is None) or any(side is not None and side < 1 for side in sides):
        raise SchemaError(f"{where}: original_width and original_height {list(sides)}; give both, in pixels, or none")
    return clip


def metadata_path(raw: Path) -> Path:
    return raw / "metadata.json"


def video_path(raw: Path, clip_id: str) -> Path:
    return raw / "videos" / f"{clip_id}.mp4"


def label_folder(raw: Path, kind: str, clip_id: str) -> Path:
    return raw / kind / clip_id


def camera_path(raw: Path, clip_id: str) -> Path:
    return raw / "camera_params" / f"{clip_id}.txt"


def refuse_url(folder: Path) -> None:
    """Data lies in folders; the name of a new one that looks like a URL was not meant as that."""
    if _URL.match(str(folder)) and not folder.exists():
        raise SchemaError(
            f"{folder} is a URL, not a folder; mount what it refers to, or copy it to a disk and give that path"
        )


def read_metadata(raw: Path) -> list[Any]:
    """The entries of the folder's `metadata.json`, not yet checked one by one."""
    refuse_url(raw)
    path = metadata_path(raw)
    if not path.is_file():
        raise SchemaError(f"no {path}; a raw folder has metadata.json beside videos, depth, points and camera_params")
    entries = read_json(path.read_bytes(), str(path))
    if not isinstance(entries, list) or not entries:
        raise SchemaError(f"{path} holds no clips; it is a list of objects, one for each clip")
    return entries


def count_frames(folder: Path) -> int:
    """How many `frame_0000.npy, frame_0001.npy, ...` a folder holds, without gaps."""
    if not folder.is_dir():
        raise SchemaError(f"no folder {folder}")
    numbers = sorted(int(match[1]) for path in folder.iterdir() if (match := _FRAME_FILE.fullmatch(path.name)))
    gap = next((want for want, found in enumerate(numbers) if want != found), None)
    if gap is not None:
        raise SchemaError(f"{folder} has no frame_{gap:04}.npy but has later frames")
    return len(numbers)


def read_labels(folder: Path, frames: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The first frames of a label folder, float32 [T, *shape]; values beyond float32 become infinite."""
    labels = np.empty((frames, *shape), np.float32)
    for t in range(frames):
        path = folder / f"frame_{t:04}.npy"
        array = parse_npy(path.read_bytes(), str(path))
        if array.shape != shape or array.dtype not in _FLOATS:
            raise SchemaError(f"{path} is {array.dtype} {list(array.shape)}; float16, 32 or 64 {list(shape)} is needed")
        with np.errstate(over="ignore"):
            labels[t] = array
    return labels


def parse_npy(data: bytes, where: str) -> NDArray[Any]:
    """The array of an npy file; pickles are refused, and so is a header that declares another size than the file's."""
    return read_npy_header(data, len(data), where).array(data)


def read_npy_header(start: bytes, file_bytes: int, where: str) -> NpyHeader:
    """What an npy file of so many bytes, of which the first are given, declares; refused as by `parse_npy`."""
    file = io.BytesIO(start)
    try:
        version = np.lib.format.read_magic(file)
        readers: Mapping[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"version {version} is unknown")
        shape, column_major, dtype = readers[version](file)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise SchemaError(f"{where} is no npy file: {error}") from None
    if dtype.hasobject:
        raise SchemaError(f"{where} holds pickled objects, which are not read; save plain numbers")
    needed, found = math.prod(shape) * dtype.itemsize, file_bytes - file.tell()
    if min(shape, default=0) < 0 or needed != found:
        raise SchemaError(f"{where} declares {needed} bytes of {dtype} {list(shape)} and has {found}")
    return NpyHeader(shape, column_major, dtype, file.tell())


def camera_bytes(cameras: Cameras) -> bytes:
    """The `camera.npy` member: float64 [T, 16], the row-major 3x4 of cam_from_world, then fx, fy, cx, cy as fractions."""
    table = torch.cat((cameras.cam_from_world[:, :3].flatten(1), cameras.intrinsics_frac), dim=1)
    file = io.BytesIO()
    np.lib.format.write_array(file, table.numpy().astype("<f8"), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def parse_cameras(data: bytes, frames: int, where: str) -> Cameras:
    """Undoes `camera_bytes`."""
    table = parse_npy(data, where)
    if table.shape != (frames, 16) or table.dtype != np.dtype("<f8") or not np.isfinite(table).all():
        raise SchemaError(f"{where} is {table.dtype} {list(table.shape)}; finite float64 {[frames, 16]} is needed")
    numbers = torch.from_numpy(table.copy())
    pose = numbers[:, :12].unflatten(1, (3, 4))
    return Cameras(rigid(pose[..., :3], pose[..., 3]), numbers[:, 12:].clone())


def info_bytes(info: SampleInfo) -> bytes:
    """The `json` member."""
    return json.dumps(asdict(info), ensure_ascii=False, sort_keys=True, allow_nan=False).encode()


def parse_info(data: bytes, where: str) -> SampleInfo:
    """Undoes `info_bytes`, with every value checked."""
    document = read_json(data, where)
    found = document.get("schema") if isinstance(document, dict) else None
    if found != VERSION:
        raise SchemaError(f"{where}: schema {found!r:.40} is unknown to this reader, which knows {VERSION}")
    info = read_record(SampleInfo, document, where)
    if not (KEY.fullmatch(info.key) and info.fps > 0 and info.scene_scale > 0 and info.video_frames >= info.frames > 0):
        raise SchemaError(
            f"{where}: key {info.key!r:.100}, fps {info.fps}, scene scale {info.scene_scale}, {info.frames} frames of a video "
            f"of {info.video_frames}: out of range"
        )
    return info


def video_facts(data: bytes, where: str, most_frames: int) -> VideoFacts:
    """Decodes a whole mp4, at most one frame more than `most_frames`."""
    frames, size = 0, (0, 0)
    try:
        # The format is named, because others refer to further files.
        with av.open(io.BytesIO(data), mode="r", format="mp4") as container:
            if not container.streams.video:
                raise SchemaError(f"{where} has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}
            for frame in container.decode(stream):
                turned = frame.rotation % 180 == 90
                size = (frame.width, frame.height) if turned else (frame.height, frame.width)
                frames += 1
                if frames > most_frames:
                    break
    except av.error.FFmpegError as error:
        raise SchemaError(f"{where} cannot be decoded after {frames} frames: {error}") from None
    return VideoFacts(frames, *size)
