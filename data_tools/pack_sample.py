"""One clip of a raw folder to the members of a sample, or the reason why it is left out.

Axes: T frames, H x W pixels.
"""

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fw_train.camera_files import read_cameras
from fw_train.data import schema
from fw_train.data.codec import Encoded, decode_depth, decode_points, encode_depth, encode_points, read_header
from fw_train.data.codec_format import LOSSLESS, Kind, PresetName
from fw_train.data.manifest import LabelTotals, Totals
from fw_train.data.schema import Bucket, LabelInfo, RawClip, SampleInfo
from fw_train.data.strict_json import SchemaError
from fw_train.geometry import Cameras, intrinsics_px, scene_scale

Float = NDArray[np.float32]
Mask = NDArray[np.bool_]


def read_clip_cameras(raw: Path, clip: RawClip) -> Cameras:
    """The cameras of all frames, their fractions made to refer to the clip's own frames."""
    cameras = read_cameras(schema.camera_path(raw, clip.id), intrinsics_frac=clip.intrinsics)
    if clip.original_size is None:
        return cameras
    height, width = clip.height, clip.width
    pixels = intrinsics_px(cameras.intrinsics_frac, height, width, clip.original_size)
    return Cameras(cameras.cam_from_world, pixels / torch.tensor([width, height, width, height]))


def pack_sample(raw: Path, clip: RawClip, bucket: Bucket, preset: PresetName) -> tuple[dict[str, bytes], SampleInfo]:
    """The members of a sample, and what its `json` says; ValueError tells why a clip cannot be packed.

    The clip may be longer than the bucket, whose first frames are then taken.
    """
    video_path = schema.video_path(raw, clip.id)
    if not video_path.is_file():
        raise SchemaError(f"no video {video_path}")
    folders = {kind: schema.label_folder(raw, kind, clip.id) for kind in ("depth", "points")}
    labelled = {kind: schema.count_frames(folder) for kind, folder in folders.items()}
    cameras = read_clip_cameras(raw, clip)
    video = video_path.read_bytes()
    facts = schema.video_facts(video, str(video_path), most_frames=max(*labelled.values(), bucket.frames))
    counts = {"video": facts.frames, **labelled, "cameras": len(cameras.cam_from_world)}
    if clip.frames is not None:
        counts["metadata"] = clip.frames
    if len(set(counts.values())) > 1:
        raise SchemaError(f"numbers of frames differ: {', '.join(f'{name} {n}' for name, n in counts.items())}")
    if facts.frames < bucket.frames:
        raise SchemaError(f"the clip has {facts.frames} frames, `--frames` asks for {bucket.frames}")
    if (facts.height, facts.width) != (bucket.height, bucket.width):
        raise SchemaError(
            f"{video_path} is {facts.height}x{facts.width} (height x width), metadata.json says {bucket.height}x{bucket.width}"
        )

    depth = schema.read_labels(folders["depth"], bucket.frames, (bucket.height, bucket.width))
    with np.errstate(invalid="ignore"):
        depth_valid = (depth > 0) & (depth < np.inf)
    if not depth_valid.any():
        raise SchemaError(f"{folders['depth']}: no pixel has a finite positive value")
    depth_data, depth_info = _encode("depth", depth, depth_valid, preset)
    del depth
    points = schema.read_labels(folders["points"], bucket.frames, (bucket.height, bucket.width, 3))
    points_valid = np.isfinite(points[..., 0]) & np.isfinite(points[..., 1]) & np.isfinite(points[..., 2])
    if not (points_valid & depth_valid).any():
        raise SchemaError(f"{folders['points']}: no pixel with depth has a finite point")
    scale = scene_scale(torch.from_numpy(points).movedim(-1, 1), torch.from_numpy(points_valid & depth_valid)).item()
    if not 1e-6 < scale < 1e9:
        raise SchemaError(f"{folders['points']}: the mean distance to the first camera is {scale:g}; check the units")
    points_data, points_info = _encode("points", points, points_valid, preset)

    info = SampleInfo(
        schema.VERSION,
        clip.id,
        clip.caption.strip(),
        clip.fps,
        *bucket,
        video_frames=facts.frames,
        depth_kind=clip.depth_kind,
        scene_scale=float(f"{scale:.6g}"),  # the last digits of a sum depend on the machine
        source=clip.source,
        depth=depth_info,
        points=points_info,
    )
    kept = Cameras(cameras.cam_from_world[: bucket.frames], cameras.intrinsics_frac[: bucket.frames])
    members = {
        schema.CAMERA: schema.camera_bytes(kept),
        schema.DEPTH: depth_data,
        schema.INFO: schema.info_bytes(info),
        schema.VIDEO: video,
        schema.POINTS: points_data,
    }
    return members, info


def _encode(kind: Kind, labels: Float, valid: Mask, preset: PresetName) -> tuple[bytes, LabelInfo]:
    """A label array [T, H, W(, 3)] encoded, and what decoding it again showed."""
    encoded: Encoded = (encode_depth if kind == "depth" else encode_points)(labels, valid, preset=preset)
    error = measured_error(kind, labels, valid, encoded.data)
    lossless = len(read_header(encoded.data).lossless_frames)
    info = LabelInfo(
        encoded.report.codec,
        preset,
        float(f"{error:.4g}"),
        labels.nbytes,
        len(encoded.data),
        lossless,
        float(f"{valid.mean():.4g}"),
    )
    return encoded.data, info


def sample_totals(info: SampleInfo, video_bytes: int) -> Totals:
    """The sums of one sample."""
    depth, points = (
        LabelTotals(label.raw_bytes, label.encoded_bytes, label.max_rel_error, info.frames, label.lossless_frames)
        for label in (info.depth, info.points)
    )
    return Totals(1, video_bytes, int(not info.caption), depth, points)


def measured_error(kind: Kind, labels: Float, valid: Mask, data: bytes) -> float:
    """Largest relative error of an encoded label array [T, H, W(, 3)], decoded frame by frame.

    Depth's is relative to the depth, that of points to the distance from the camera that the codec fitted to the frame.
    """
    header, worst = read_header(data), 0.0
    for t in range(header.frames):
        values, mask = (decode_depth if kind == "depth" else decode_points)(data, [t])
        decoded, truth, seen = values[0], labels[t], valid[t]
        if not np.array_equal(mask[0], seen):
            raise SchemaError(f"{kind}, frame {t}: the mask of valid pixels changed in the codec")
        if header.table["mode"][t] == LOSSLESS:
            if not np.array_equal(decoded[seen], truth[seen]):
                raise SchemaError(f"{kind}, frame {t}: values changed in the lossless codec")
            continue
        if not seen.all():  # pixels without a value are 0 once decoded
            truth = np.where(seen if kind == "depth" else seen[..., None], truth, np.float32(0))
        if kind == "depth":
            squared, distance_squared = (decoded - truth) ** 2, truth**2
        else:
            off, ray = decoded - truth, truth - header.table["parameters"][t][11:]
            squared, distance_squared = (np.einsum("hwc,hwc->hw", v, v) for v in (off, ray))
        worst = max(worst, float(np.max(squared / np.maximum(distance_squared, np.float32(1e-30)))))
    return math.sqrt(worst)
