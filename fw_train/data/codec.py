"""geo1, the label codec: depth and point maps with a bounded error, 15 to 55 times smaller than float32 where clean.

Depth becomes uint16 codes of its logarithm, so the error is relative: 5.01e-4 at most (`default`) or 1.02e-4 (`tight`).
Points become depths along the rays of a camera fitted to each frame: 7e-4 at most, or 1.4e-4, of the distance from that
camera. `lossless` keeps every bit, those of NaNs included. The encoder decodes what it wrote, measures the error and
keeps lossless each frame that misses the bound; the report says which and why.

A pixel is valid where the caller's mask says so and its value is finite (and positive, for depth). The others come back
as 0 from `default` and `tight`, and as they were from `lossless`.

Axes: T frames of a file, N decoded frames, P planes (1 depth, 3 points), H x W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fw_train.data.codec_format import (
    LOSSLESS,
    LOSSY,
    PARAMETERS,
    PLANES,
    PRESET_NAMES,
    Buffer,
    FrameChunks,
    Header,
    Kind,
    PresetName,
    check_shape,
    frame_chunks,
    read_header,
    write_file,
)
from fw_train.data.codec_planes import (
    CannotHold,
    CodecError,
    compress,
    decompress_into,
    delta,
    exp_table,
    log_codes,
    strips,
    undelta,
)
from fw_train.data.codec_points import FrameCodes, pixel_grid, ray_codes, unproject

__all__ = [
    "CodecError",
    "Codes",
    "Encoded",
    "Header",
    "Report",
    "decode_codes",
    "decode_depth",
    "decode_points",
    "encode_depth",
    "encode_points",
    "read_header",
    "reconstruct",
]

TINY = np.float32(1e-30)  # below any distance that the lossy code takes, or its square

Float = NDArray[np.float32]
Mask = NDArray[np.bool_]
Allocate = Callable[[tuple[int, ...], Any], NDArray[Any]]  # as np.empty


class Precision(NamedTuple):
    """Step of log depth, and the largest relative error that a frame may have."""

    log_step: float
    bound: dict[Kind, float]


PRECISION: dict[PresetName, Precision] = {
    "default": Precision(1e-3, {"depth": 5.01e-4, "points": 7e-4}),
    "tight": Precision(2e-4, {"depth": 1.02e-4, "points": 1.4e-4}),
    "lossless": Precision(0.0, {"depth": 0.0, "points": 0.0}),
}


class Report(NamedTuple):
    """What encoding did."""

    codec: str
    kind: Kind
    preset: PresetName
    max_rel_error: float  # measured on the decoded values; 0 where every frame is lossless
    raw_bytes: int
    encoded_bytes: int
    fell_back: bool  # some frame is lossless although the preset is not
    why: str  # the frames that fell back, by reason; empty otherwise


class Encoded(NamedTuple):
    """A geo1 file and the report on it."""

    data: bytes
    report: Report


class Codes(NamedTuple):
    """Entropy-decoded frames: what a DataLoader worker hands over, for `codec_torch.expand` to finish on the device.

    Deltas are not summed up here: on a CPU core that takes longer than the entropy decoding, on a GPU no time to speak of.
    """

    kind: Kind
    log_step: float
    lossy: NDArray[np.int64]  # [L] places among the N decoded frames
    deltas: NDArray[np.uint16]  # [L, P, H, W]
    parameters: Float  # [L, 1 or 14]
    lossless: NDArray[np.int64]  # [N - L] places of the others
    exact: Float  # [N - L, P, H, W]
    exact_valid: Mask  # [N - L, H, W]


def encode_depth(depth: Float, valid: Mask | None = None, *, preset: PresetName = "default") -> Encoded:
    """Encodes depth [T, H, W]; `valid` bool [T, H, W]."""
    if depth.ndim != 3:
        raise ValueError(f"depth must be [T, H, W], not {list(depth.shape)}")
    return _encode("depth", depth[:, None], valid, preset)


def encode_points(points: Float, valid: Mask | None = None, *, preset: PresetName = "default") -> Encoded:
    """Encodes points [T, H, W, 3] in any one frame of reference; `valid` bool [T, H, W]."""
    if points.ndim != 4 or points.shape[3] != 3:
        raise ValueError(f"points must be [T, H, W, 3], not {list(points.shape)}")
    return _encode("points", np.moveaxis(points, 3, 1), valid, preset)


def decode_codes(data: Buffer, frames: Sequence[int] | None = None, empty: Allocate = np.empty) -> Codes:
    """Undoes the entropy coding of the given frames, in the given order; of all frames by default. `empty` allocates planes."""
    header = read_header(data)
    chosen = np.array(_chosen(frames, header.frames), np.int64)
    is_lossless = header.table["mode"][chosen] == LOSSLESS
    lossy, lossless = np.flatnonzero(~is_lossless), np.flatnonzero(is_lossless)
    shape = PLANES[header.kind], header.height, header.width
    deltas = empty((len(lossy), *shape), np.uint16)
    exact = empty((len(lossless), *shape), np.float32)
    exact_valid = np.empty((len(lossless), *shape[1:]), np.bool_)
    for frame_deltas, frame in zip(deltas, chosen[lossy], strict=True):
        decompress_into(frame_chunks(data, header, frame)[0], frame_deltas, f"frame {frame}")
    for planes, mask, frame in zip(exact, exact_valid, chosen[lossless], strict=True):
        planes[...], mask[...] = _read_lossless(*frame_chunks(data, header, frame), shape, f"frame {frame}")
    parameters = header.table["parameters"][chosen[lossy]].astype(np.float32)
    log_step = PRECISION[header.preset].log_step
    return Codes(header.kind, log_step, lossy, deltas, parameters, lossless, exact, exact_valid)


def decode_depth(data: Buffer, frames: Sequence[int] | None = None) -> tuple[Float, Mask]:
    """Depth [N, H, W] and validity [N, H, W] of the given frames, in the given order."""
    planes, valid = _decode("depth", data, frames)
    return planes[:, 0], valid


def decode_points(data: Buffer, frames: Sequence[int] | None = None) -> tuple[Float, Mask]:
    """Points [N, H, W, 3] and validity [N, H, W] of the given frames, in the given order."""
    planes, valid = _decode("points", data, frames)
    return np.moveaxis(planes, 1, 3), valid


def reconstruct(codes: Codes) -> tuple[Float, Mask]:
    """Planes [N, P, H, W], P innermost in memory, and validity [N, H, W]; `codec_torch.expand` in numpy."""
    count = len(codes.lossy) + len(codes.lossless)
    _, planes_per_frame, height, width = codes.deltas.shape
    planes = np.moveaxis(np.empty((count, height, width, planes_per_frame), np.float32), 3, 1)
    valid = np.empty((count, height, width), np.bool_)
    for at, deltas, parameters in zip(codes.lossy, codes.deltas, codes.parameters, strict=True):
        for rows, values, seen in _decoded_strips(codes.kind, codes.log_step, deltas, parameters):
            planes[at][:, rows], valid[at][rows] = values, seen
    planes[codes.lossless], valid[codes.lossless] = codes.exact, codes.exact_valid
    return planes, valid


def _encode(kind: Kind, planes: Float, mask: Mask | None, preset: PresetName) -> Encoded:
    """Encodes [T, P, H, W]."""
    if planes.dtype != np.float32:
        raise ValueError(f"{kind} must be float32, not {planes.dtype}; convert it with .astype(np.float32)")
    if preset not in PRESET_NAMES:
        raise ValueError(f"unknown preset {preset!r}; use one of {', '.join(PRESET_NAMES)}")
    frames, _, height, width = planes.shape
    check_shape(frames, height, width)
    if mask is not None and (mask.dtype != np.bool_ or mask.shape != (frames, height, width)):
        raise ValueError(f"valid must be bool {[frames, height, width]}, not {mask.dtype} {list(mask.shape)}")

    encoded: list[FrameChunks] = []
    worst = 0.0
    reasons: dict[str, list[int]] = {}
    for t in range(frames):
        frame = np.ascontiguousarray(planes[t])
        valid = _valid(kind, frame)
        if mask is not None:
            valid &= mask[t]
        if preset == "lossless":
            encoded.append(_lossless_frame(kind, frame, valid))
            continue
        if not valid.all():
            frame = np.where(valid, frame, np.float32(0))
        try:
            chunks, error = _lossy_frame(kind, frame, valid, PRECISION[preset])
            worst = max(worst, error)
        except CannotHold as reason:
            reasons.setdefault(str(reason), []).append(t)
            chunks = _lossless_frame(kind, frame, valid)
        encoded.append(chunks)
    data = write_file(kind, preset, height, width, encoded)
    report = Report("geo1", kind, preset, worst, planes.nbytes, len(data), bool(reasons), _explain(reasons, frames))
    return Encoded(data, report)


def _explain(reasons: dict[str, list[int]], frames: int) -> str:
    """The first few reasons, each with its frames."""
    shown = list(reasons.items())[:3]
    parts = [f"frames {', '.join(map(str, at))} of {frames}: {reason}" for reason, at in shown]
    rest = sum(len(at) for at in reasons.values()) - sum(len(at) for _, at in shown)
    return "; ".join(parts + ([f"and {rest} frames more"] if rest else []))


def _valid(kind: Kind, planes: Float) -> Mask:
    """Which pixels of [P, H, W] have a value."""
    if kind == "depth":
        return (planes[0] > 0) & (planes[0] < np.inf)
    x, y, z = np.isfinite(planes)
    return x & y & z


def _lossy_frame(kind: Kind, planes: Float, valid: Mask, precision: Precision) -> tuple[FrameChunks, float]:
    """Encodes [P, H, W], 0 where not valid, and returns the error measured on what it decodes to."""
    bound = precision.bound[kind]
    if kind == "depth":
        codes, scale = log_codes(planes[0], valid, precision.log_step)
        coded = FrameCodes(codes[None], np.array([scale]))
    else:
        coded = ray_codes(planes, valid, precision.log_step, bound)
    chunk = compress(delta(coded.codes))
    deltas = np.empty_like(coded.codes)
    decompress_into(memoryview(chunk), deltas, "the frame just written")
    error = 0.0
    for rows, decoded, decoded_valid in _decoded_strips(kind, precision.log_step, deltas, coded.parameters):
        if not np.array_equal(decoded_valid, valid[rows]):
            raise CannotHold("the validity mask changed in decoding")
        here = _relative_error(planes[:, rows], decoded, coded.parameters[11:])
        if not here <= bound:
            raise CannotHold(f"the decoded values are off by {here:.2g}, more than {bound:g}")
        error = max(error, here)
    return FrameChunks(LOSSY, chunk, b"", coded.parameters), error


def _relative_error(planes: Float, decoded: Float, centre: Float) -> float:
    """Largest |decoded - truth| / |truth - centre| of [P, H, W], both 0 where not valid."""
    off = decoded - planes
    if len(planes) == 1:  # depth, with centre 0
        return float(np.max(np.abs(off[0]) / np.maximum(planes[0], TINY)))
    distance = planes - centre[:, None, None]
    off *= off
    distance *= distance
    squared, distance_squared = off[0] + off[1] + off[2], distance[0] + distance[1] + distance[2]
    return float(np.sqrt(np.max(squared / np.maximum(distance_squared, TINY))))


def _lossless_frame(kind: Kind, planes: Float, valid: Mask) -> FrameChunks:
    """Keeps every bit of [P, H, W] and of the mask, and checks that it did."""
    chunk, mask = compress(delta(planes.view(np.uint32))), compress(np.packbits(valid)[None])
    back, back_valid = _read_lossless(memoryview(chunk), memoryview(mask), planes.shape, "the frame just written")
    if not (np.array_equal(back.view(np.uint32), planes.view(np.uint32)) and np.array_equal(back_valid, valid)):
        raise CodecError("blosc2 does not return the bytes that it was given; check the installed version")
    return FrameChunks(LOSSLESS, chunk, mask, np.zeros(PARAMETERS[kind], np.float32))


def _read_lossless(chunk: memoryview, mask: memoryview, shape: tuple[int, ...], where: str) -> tuple[Float, Mask]:
    """Planes [P, H, W] and validity [H, W] of a lossless frame."""
    deltas = np.empty(shape, np.uint32)
    decompress_into(chunk, deltas, where)
    pixels = shape[1] * shape[2]
    packed = np.empty((1, (pixels + 7) // 8), np.uint8)
    decompress_into(mask, packed, f"{where}, validity mask")
    valid = np.unpackbits(packed[0], count=pixels).view(np.bool_).reshape(shape[1:])
    return undelta(deltas).view(np.float32), valid


def _decoded_strips(
    kind: Kind, log_step: float, deltas: NDArray[np.uint16], parameters: Float
) -> Iterator[tuple[slice, Float, Mask]]:
    """Row ranges of a lossy frame with their planes [P, rows, W] and validity [rows, W]."""
    codes, table = undelta(deltas), exp_table(log_step)
    columns, all_rows = pixel_grid(*codes.shape[1:])
    for rows in strips(codes.shape[1]):
        valid = codes[0, rows] != 0
        z = np.take(table, codes[0, rows])
        z *= parameters[0]
        if kind == "depth":
            yield rows, z[None], valid
            continue
        du, dv = codes[1:, rows].view(np.int16).astype(np.float32)
        planes = np.concatenate(unproject(z[None], du[None], dv[None], columns, all_rows[rows], parameters[None]))
        planes[:, ~valid] = 0
        yield rows, planes, valid


def _decode(kind: Kind, data: Buffer, frames: Sequence[int] | None) -> tuple[Float, Mask]:
    """Planes [N, P, H, W] and validity [N, H, W]."""
    codes = decode_codes(data, frames)
    if codes.kind != kind:
        raise CodecError(f"the file holds {codes.kind}; decode it with decode_{codes.kind}")
    return reconstruct(codes)


def _chosen(frames: Sequence[int] | None, total: int) -> list[int]:
    chosen = list(range(total)) if frames is None else [index(frame) for frame in frames]
    outside = [frame for frame in chosen if not 0 <= frame < total]
    if outside:
        raise ValueError(f"frames {outside} are not in the file, which has frames 0 to {total - 1}")
    return chosen
