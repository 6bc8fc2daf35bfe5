"""One sample of a packed dataset as a view shows it, decoded as far as a loader process does: codes, planes, latents.

Whatever is wrong with a sample is a ValueError or an OSError that says so; nothing is guessed, filled up or cut short.

Axes: T frames, H x W pixels, F latent frames, L text tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from fw_train.batch import DepthKind, latent_frames
from fw_train.data import schema
from fw_train.data.augment import View
from fw_train.data.codec import Allocate, Codes, decode_codes, read_header
from fw_train.data.codec_torch import CodeTensors, as_tensors
from fw_train.data.manifest import Dataset
from fw_train.data.schema import Bucket, SampleInfo
from fw_train.data.sidecar import Sidecar
from fw_train.data.strict_json import SchemaError
from fw_train.data.transform import crop_intrinsics, cut_codes
from fw_train.data.video import VideoFrames, decode_video
from fw_train.geometry import Cameras, invert_rigid, mirror_cameras

LATENT_KINDS = ("image", "latent")  # cut to the first latent frames: the VAE's encoder looks back alone


@dataclass(frozen=True)
class Wanted:
    """What is read of each sample."""

    members: tuple[str, ...]  # kinds of sidecars
    labels: bool  # depth, points and cameras
    video: bool
    text_tokens: int


class CodedLabels(NamedTuple):
    """Depth and points up to the window's last row and column, and the cameras that they were seen by."""

    depth: CodeTensors
    points: CodeTensors  # in the frame of the packed clip's first camera
    cameras: Cameras  # of the view's frames, cropped and mirrored
    first_from_packed: Tensor  # float64 [4, 4]: from that frame to the view's first camera's


class CodedSample(NamedTuple):
    """What a loader process hands over."""

    key: str
    caption: str
    fps: float
    depth_kind: DepthKind
    scene_scale: float  # of the packed clip
    view: View
    labels: CodedLabels | None
    video: VideoFrames | None  # the window alone, not yet scaled, mirrored or recoloured
    encoded: Mapping[str, Tensor]  # by kind of sidecar


class SampleReader:
    """Reads the samples of one dataset; may be pickled."""

    def __init__(self, dataset: Dataset, sidecars: Sequence[Sidecar], wanted: Wanted) -> None:
        self.dataset, self.sidecars, self.wanted = dataset, tuple(sidecars), wanted
        labels = (schema.CAMERA, schema.DEPTH, schema.POINTS) if wanted.labels else ()
        video = (schema.VIDEO,) if wanted.video else ()
        self._suffixes = (schema.INFO, *labels, *video)

    def key(self, row: int) -> str:
        """The name of a row, for messages; damaged rows have their number."""
        try:
            return self.dataset.sample(row).key
        except ValueError:
            return f"row {row}"

    def read(self, row: int, bucket: Bucket, view: View, empty: Allocate = np.empty) -> CodedSample:
        """The sample of a row, which must be of the bucket; `empty` allocates what is large."""
        key = self.dataset.sample(row).key
        members = self.dataset.read(row, self._suffixes)
        info = schema.parse_info(members[schema.INFO], f"{key}.{schema.INFO}")
        if (info.key, info.bucket) != (key, bucket):
            raise SchemaError(f"{key}.{schema.INFO} belongs to {info.key}, {info.bucket}; here is {key}, {bucket}")
        return CodedSample(
            key,
            info.caption,
            info.fps,
            info.depth_kind,
            info.scene_scale,
            view,
            _labels(members, info, view, empty) if self.wanted.labels else None,
            _video(members[schema.VIDEO], info, view, empty) if self.wanted.video else None,
            {sidecar.kind: self._encoded(sidecar, row, view) for sidecar in self.sidecars},
        )

    def _encoded(self, sidecar: Sidecar, row: int, view: View) -> Tensor:
        tensor = sidecar.read(row)[sidecar.kind]
        if sidecar.kind in LATENT_KINDS:
            return tensor[:, : latent_frames(len(view.frames))].contiguous()
        if sidecar.kind == "text" and len(tensor) > self.wanted.text_tokens:
            raise SchemaError(
                f"its text has {len(tensor)} tokens, data.text_tokens is {self.wanted.text_tokens}; raise that"
            )
        return tensor


def _labels(members: Mapping[str, bytes], info: SampleInfo, view: View, empty: Allocate) -> CodedLabels:
    where = f"{info.key}.{schema.CAMERA}"
    packed = schema.parse_cameras(members[schema.CAMERA], info.frames, where)
    chosen = list(view.frames)
    cameras = Cameras(packed.cam_from_world[chosen], crop_intrinsics(packed.intrinsics_frac[chosen], view.crop))
    packed_first = Cameras(packed.cam_from_world[:1], packed.intrinsics_frac[:1])
    if view.flipped:
        cameras, packed_first = mirror_cameras(cameras), mirror_cameras(packed_first)
    return CodedLabels(
        _codes("depth", members[schema.DEPTH], info, view, empty),
        _codes("points", members[schema.POINTS], info, view, empty),
        cameras,
        cameras.cam_from_world[0] @ invert_rigid(packed_first.cam_from_world[0]),
    )


def _codes(kind: Literal["depth", "points"], data: bytes, info: SampleInfo, view: View, empty: Allocate) -> CodeTensors:
    where = f"{info.key}.{schema.DEPTH if kind == 'depth' else schema.POINTS}"
    header = read_header(data)
    if (header.kind, header.height, header.width, header.frames) != (kind, *info.bucket):
        raise SchemaError(
            f"{where} is {header.kind} {header.height}x{header.width}x{header.frames}; {kind} {info.bucket} is needed"
        )
    codes = decode_codes(data, view.frames, empty)
    _check_exact(codes, where)
    return as_tensors(codes if view.crop.keeps_all else cut_codes(codes, view.crop))


def _check_exact(codes: Codes, where: str) -> None:
    """Lossless frames keep any number there is; valid pixels must be finite, and depth positive."""
    for planes, valid in zip(codes.exact, codes.exact_valid, strict=True):
        sound = np.isfinite(planes).all(axis=0)
        if codes.kind == "depth":
            sound &= planes[0] > 0
        if not sound[valid].all():
            raise SchemaError(f"{where} has valid pixels that are NaN, infinite or not in front of the camera")


def _video(data: bytes, info: SampleInfo, view: View, empty: Allocate) -> VideoFrames:
    video = decode_video(data, view.frames, None if view.crop.keeps_all else view.crop.window, empty)
    wanted = (len(view.frames), *view.crop.window[2:])
    if video.y.shape != wanted:
        raise SchemaError(f"{info.key}.{schema.VIDEO} gives {list(video.y.shape)}; {list(wanted)} is needed")
    return video
