"""What the audit shows of a clip: frames, depth and errors as JPEG, the camera's path as places.

Axes: T frames, N pictured ones, h x w pixels of a picture.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.audit_checks import grid_labels
from data_tools.audit_clip import Limits, decode_clip, diagnose_clip
from data_tools.audit_geometry import Labels, attempt, relative_errors
from data_tools.preview import video_pictures
from fw_train.data.manifest import Dataset
from fw_train.data.schema import VIDEO
from fw_train.geometry import relative_to_first
from fw_train.pictures import colours
from fw_train.pictures.camera_path import CameraPath, path_of_poses
from fw_train.pictures.drawing import Picture

PICTURED = 4
LARGEST = 320  # pixels along a picture's longer side
ERRORS = 1e-3, 1.0  # relative errors at the ends of the colour map
JPEG_QUALITY = "4"  # of 1, best, to 31


class Row(NamedTuple):
    """Pictures side by side."""

    label: str
    pictures: tuple[bytes, ...]  # JPEG


class ClipPictures(NamedTuple):
    frames: tuple[int, ...]
    rows: tuple[Row, ...]
    path: CameraPath  # in the first camera's frame, as given
    repaired: CameraPath | None  # some frames of it, where the mistake that was found is about it


def draw_clip(dataset: Dataset, row: int, limits: Limits) -> ClipPictures:
    """The pictures of a clip that can be read."""
    members = dataset.read(row)
    diagnosis = diagnose_clip(decode_clip(members), limits.tolerance)
    clip = decode_clip(members, PICTURED)
    chosen, valid = clip.chosen, (clip.depth_valid & clip.points_valid)[list(clip.chosen)]
    factor = max(clip.info.height, clip.info.width) / LARGEST
    size = tuple(round(side / max(factor, 1)) for side in (clip.info.height, clip.info.width))
    labels = grid_labels(clip.depth, clip.points, valid, clip.cameras, chosen, clip.info.depth_kind, (size[0], size[1]))
    pictures = [
        Row("video", tuple(jpeg_bytes(picture, size) for picture in video_pictures(members[VIDEO], chosen, VIDEO))),
        Row("depth", tuple(jpeg_bytes(picture, size) for picture in _depth_pictures(labels, size))),
        Row("error", tuple(jpeg_bytes(picture, size) for picture in _error_pictures(labels, size))),
    ]
    repaired = None
    if diagnosis.changes:
        labels, _ = attempt(labels, diagnosis.changes)
        pictures.append(Row("error, repaired", tuple(jpeg_bytes(p, size) for p in _error_pictures(labels, size))))
        if any(change.part in ("poses", "scale") for change in diagnosis.changes):
            repaired = _path(labels.cam_from_world)
    return ClipPictures(chosen, tuple(pictures), _path(clip.cameras.cam_from_world), repaired)


def jpeg_bytes(picture: Picture, size: Sequence[int]) -> bytes:
    """A JPEG of the size (height, width)."""
    encoder = av.CodecContext.create("mjpeg", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.height, encoder.width = size
    encoder.pix_fmt, encoder.time_base = "yuvj444p", Fraction(1)
    encoder.options = {"qmin": JPEG_QUALITY, "qmax": JPEG_QUALITY}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    frame = frame.reformat(size[1], size[0], "yuvj444p", interpolation="AREA", dst_color_range="JPEG")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def error_colours(share: NDArray[np.float64]) -> Picture:
    """Colours [..., 3] of relative errors [...], even in their logarithm."""
    low, high = np.log(ERRORS)
    return colours.heat_colours(np.clip((np.log(np.maximum(share, 1e-12)) - low) / (high - low), 0, 1))


def _depth_pictures(labels: Labels, size: Sequence[int]) -> list[Picture]:
    depth, valid = (values.unflatten(1, tuple(size)).numpy() for values in (labels.depth, labels.valid))
    if labels.kind == "affine_disparity":
        depth = 1 / np.where(valid, depth, 1)
    scale = colours.depth_scale(depth, valid)
    return [colours.depth_picture(*frame, scale) for frame in zip(depth, valid, strict=True)]


def _error_pictures(labels: Labels, size: Sequence[int]) -> list[Picture]:
    errors = relative_errors(labels).unflatten(1, tuple(size)).numpy()
    valid = labels.valid.unflatten(1, tuple(size)).numpy()
    return [
        colours.with_checks(error_colours(np.where(np.isfinite(here), here, ERRORS[1])), seen)
        for here, seen in zip(errors, valid, strict=True)
    ]


def _path(cam_from_world: torch.Tensor) -> CameraPath:
    return path_of_poses(relative_to_first(cam_from_world).numpy())
