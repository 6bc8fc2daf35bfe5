"""One clip of a packed dataset: what is decoded of it, and all checks."""

import hashlib
import io
from itertools import pairwise
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from data_tools import audit_checks as checks
from data_tools.audit_checks import Bits, Finding, Float
from data_tools.audit_geometry import Diagnosis, diagnose
from data_tools.preview import even_frames
from fw_train.data.codec import decode_codes, decode_depth, decode_points
from fw_train.data.codec_format import frame_chunks, read_header
from fw_train.data.codec_planes import undelta
from fw_train.data.manifest import Dataset
from fw_train.data.schema import CAMERA, DEPTH, INFO, POINTS, VIDEO, SampleInfo, parse_cameras, parse_info, parse_npy
from fw_train.data.strict_json import SchemaError
from fw_train.geometry import Cameras

FRAMES = 8  # in which geometry is compared
SMALL = 128  # pixels, about the width of the pictures that motion is judged by


class Limits(NamedTuple):
    tolerance: float  # relative error between unprojected depth and points
    min_coverage: float  # fraction of valid pixels in each frame


class Clip(NamedTuple):
    """The decoded labels of a clip, T frames, N of them chosen."""

    info: SampleInfo
    cameras: Cameras  # of T frames
    depth_valid: Bits  # [T, H, W]
    points_valid: Bits  # [T, H, W]
    chosen: tuple[int, ...]
    depth: NDArray[np.float32]  # [N, H, W]
    points: NDArray[np.float32]  # [N, H, W, 3]


class ClipFacts(NamedTuple):
    """Evidence about a clip that could be read."""

    info: SampleInfo
    chosen: tuple[int, ...]
    error: float  # of unprojected depth against points, median of the worst frame
    frame_errors: tuple[float, ...]  # [N]
    repaired_error: float  # without the mistake that was found
    coverage: Float  # [T], fraction of pixels with depth and points
    change: Float  # [T - 1], grey levels by which the picture changes
    motion_px: Float  # [T - 1], by which the camera moves the picture
    video_sha256: str


class ClipAudit(NamedTuple):
    row: int
    key: str
    findings: tuple[Finding, ...]
    facts: ClipFacts | None  # None: it could not be read


def audit_clip(dataset: Dataset, row: int, limits: Limits) -> ClipAudit:
    """All checks of a clip; what cannot be read is a finding, not an error."""
    key = dataset.sample(row).key
    try:
        members = dataset.read(row)
        broken = broken_cameras(members)
        if broken:
            return ClipAudit(row, key, (Finding("not-finite", broken),), None)
        findings, facts = _check(members, limits)
    except ValueError as error:
        return ClipAudit(row, key, (Finding("unreadable", str(error)),), None)
    return ClipAudit(row, key, tuple(findings), facts)


def broken_cameras(members: dict[str, bytes]) -> str:
    """Says which cameras are not finite; they would make everything else unreadable."""
    table = parse_npy(members[CAMERA], CAMERA)
    frames = np.flatnonzero(~np.isfinite(table).all(axis=-1))
    return f"NaN or infinity in the cameras of {checks.frames_text(frames)} of {len(table)}" if len(frames) else ""


def decode_clip(members: dict[str, bytes], count: int = FRAMES) -> Clip:
    """Decodes the validity of all frames and the values of `count` of them."""
    info = parse_info(members[INFO], INFO)
    cameras = parse_cameras(members[CAMERA], info.frames, CAMERA)
    depth_valid, points_valid = (valid_pixels(members[suffix]) for suffix in (DEPTH, POINTS))
    if not depth_valid.shape == points_valid.shape == (info.frames, info.height, info.width):
        raise SchemaError(f"depth {depth_valid.shape} and points {points_valid.shape} are not {info.bucket}")
    chosen = even_frames(info.frames, count)
    depth, points = decode_depth(members[DEPTH], chosen)[0], decode_points(members[POINTS], chosen)[0]
    return Clip(info, cameras, depth_valid, points_valid, chosen, depth, points)


def diagnose_clip(clip: Clip, tolerance: float) -> Diagnosis:
    """Compares depth, points and cameras on a grid of the chosen frames."""
    valid = (clip.depth_valid & clip.points_valid)[list(clip.chosen)]
    kind = clip.info.depth_kind
    return diagnose(checks.grid_labels(clip.depth, clip.points, valid, clip.cameras, clip.chosen, kind), tolerance)


def _check(members: dict[str, bytes], limits: Limits) -> tuple[list[Finding], ClipFacts]:
    clip = decode_clip(members)
    info = clip.info
    findings = [] if info.caption else [Finding("caption-missing", "the caption is empty")]
    valid = clip.depth_valid, clip.points_valid, clip.depth_valid & clip.points_valid
    depth_share, points_share, both_share = (pixels.mean(axis=(1, 2)) for pixels in valid)
    findings += checks.check_coverage(depth_share, points_share, both_share, limits.min_coverage)

    diagnosis = diagnose_clip(clip, limits.tolerance)
    findings += checks.check_geometry(diagnosis, clip.chosen, limits.tolerance)

    change = np.abs(np.diff(small_pictures(members[VIDEO], info.frames), axis=0)).mean(axis=(1, 2), dtype=np.float64)
    # Where units do not fit each other, only turning is known to move the picture.
    fits = diagnosis.repaired.error <= limits.tolerance and all(made.part != "scale" for made in diagnosis.changes)
    motion_px = checks.camera_motion_px(clip.cameras, info.scene_scale if fits else np.inf, info.width)
    repeated = repeated_labels(members[DEPTH]) & (depth_share[1:] > 0)
    repeated |= repeated_labels(members[POINTS]) & (points_share[1:] > 0)
    findings += checks.check_motion(change, motion_px, repeated)
    given, sha256 = diagnosis.given, hashlib.sha256(members[VIDEO]).hexdigest()
    repaired = diagnosis.repaired.error
    return findings, ClipFacts(
        info, clip.chosen, given.error, given.frame_errors, repaired, both_share, change, motion_px, sha256
    )


def valid_pixels(data: bytes) -> Bits:
    """Validity [T, H, W] of an encoded label, without decoding the values."""
    codes = decode_codes(data)
    count = len(codes.lossy) + len(codes.lossless)
    valid = np.empty((count, *codes.deltas.shape[2:]), np.bool_)
    for at, deltas in zip(codes.lossy, codes.deltas, strict=True):
        valid[at] = undelta(deltas[:1])[0] != 0
    valid[codes.lossless] = codes.exact_valid
    return valid


def repeated_labels(data: bytes) -> Bits:
    """Whether each frame's label is that of the frame before, bit for bit, [T - 1]."""
    header = read_header(data)
    parts = [
        (*frame_chunks(data, header, frame), header.table["parameters"][frame].tobytes())
        for frame in range(header.frames)
    ]
    return np.array([after == before for before, after in pairwise(parts)], np.bool_)


def small_pictures(data: bytes, frames: int) -> NDArray[np.float32]:
    """The first frames of an mp4 in grey [T, h, w], reduced by averaging."""
    pictures: list[NDArray[Any]] = []
    try:
        with av.open(io.BytesIO(data), mode="r", format="mp4") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for frame in container.decode(video=0):
                factor = max(1, frame.width // SMALL)
                small = frame.reformat(frame.width // factor, frame.height // factor, "gray", interpolation="AREA")
                pictures.append(small.to_ndarray())
                if len(pictures) == frames:
                    return np.stack(pictures).astype(np.float32)
    except av.error.FFmpegError as error:
        raise SchemaError(f"{VIDEO} cannot be decoded after {len(pictures)} frames: {error}") from None
    raise SchemaError(f"{VIDEO} has {len(pictures)} frames, {frames} are labelled; pack the clip again")
