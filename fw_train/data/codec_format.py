"""The geo1 file: a fixed header, a table with one row per frame, then the frames' chunks; all little-endian.

    magic "GEO1" | u16 version | u8 kind | u8 preset | u8 dtype | 3 zero bytes | u32 T, H, W | u64 file bytes | u32 CRC
    T rows: u8 mode | u32 plane bytes | u32 mask bytes | u32 CRC of the chunks | float32 parameters (1 depth, 14 points)
    T frames: a blosc2 chunk of the planes, followed in a lossless frame by one of the packed validity mask

The CRC in the header covers what precedes it and the table. Every length is checked before anything is allocated.
"""

import struct
import zlib
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from fw_train.data.codec_planes import CodecError

Kind = Literal["depth", "points"]
PresetName = Literal["default", "tight", "lossless"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PRESET_NAMES: tuple[PresetName, ...] = get_args(PresetName)
PLANES: dict[Kind, int] = {"depth": 1, "points": 3}
PARAMETERS: dict[Kind, int] = {"depth": 1, "points": 14}

LOSSY, LOSSLESS = 0, 1  # modes of a frame
MAX_SIDE = 16384
MAX_PIXELS = 1 << 28  # T*H*W: 1 GiB of float32 depth; longer clips belong in several files

_MAGIC, _VERSION, _FLOAT32 = b"GEO1", 1, 1
_FIXED = struct.Struct("<4sHBBB3xIIIQ")
_CRC = struct.Struct("<I")

Buffer = bytes | bytearray | memoryview


class Header(NamedTuple):
    """What a geo1 file holds; chunk t lies at `offsets[t]:offsets[t + 1]`."""

    kind: Kind
    preset: PresetName
    frames: int
    height: int
    width: int
    table: NDArray[np.void]  # [T]: mode, plane_bytes, mask_bytes, crc, parameters
    offsets: NDArray[np.int64]  # [T + 1]

    @property
    def lossless_frames(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.table["mode"] == LOSSLESS)


class FrameChunks(NamedTuple):
    """One encoded frame."""

    mode: int
    planes: bytes
    mask: bytes
    parameters: NDArray[np.float32]


def check_shape(frames: int, height: int, width: int) -> None:
    """Refuses sizes outside the format."""
    if not (
        frames >= 1 and 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and frames * height * width <= MAX_PIXELS
    ):
        raise ValueError(
            f"{frames} frames of {height}x{width} are outside geo1's limits: sides of 1 to {MAX_SIDE} pixels, "
            f"at least one frame and at most {MAX_PIXELS} pixels in all; split the clip"
        )


def row_type(kind: Kind) -> np.dtype[np.void]:
    """One row of the frame table."""
    parameters = ("parameters", "<f4", (PARAMETERS[kind],))
    return np.dtype([("mode", "u1"), ("plane_bytes", "<u4"), ("mask_bytes", "<u4"), ("crc", "<u4"), parameters])


def write_file(kind: Kind, preset: PresetName, height: int, width: int, frames: list[FrameChunks]) -> bytes:
    """The bytes of a geo1 file."""
    table = np.zeros(len(frames), row_type(kind))
    for row, frame in zip(table, frames, strict=True):
        row["mode"], row["parameters"] = frame.mode, frame.parameters
        row["plane_bytes"], row["mask_bytes"] = len(frame.planes), len(frame.mask)
        row["crc"] = zlib.crc32(frame.mask, zlib.crc32(frame.planes))
    body = b"".join(part for frame in frames for part in (frame.planes, frame.mask))
    total = _FIXED.size + _CRC.size + table.nbytes + len(body)
    codes = KINDS.index(kind), PRESET_NAMES.index(preset)
    fixed = _FIXED.pack(_MAGIC, _VERSION, *codes, _FLOAT32, len(frames), height, width, total)
    crc = zlib.crc32(table.tobytes(), zlib.crc32(fixed))
    return b"".join((fixed, _CRC.pack(crc), table.tobytes(), body))


def read_header(data: Buffer) -> Header:
    """The header of a whole geo1 file, with every field and length checked."""
    size, start = len(data), _FIXED.size + _CRC.size
    if size < start:
        raise CodecError(f"truncated: {size} bytes, a geo1 header alone takes {start}")
    magic, version, kind_code, preset_code, dtype, frames, height, width, total = _FIXED.unpack_from(data)
    if magic != _MAGIC:
        raise CodecError(f"not a geo1 file: it starts with {magic!r} instead of {_MAGIC!r}")
    if version != _VERSION:
        raise CodecError(f"geo1 version {version} is unknown to this reader, which knows {_VERSION}")
    if kind_code >= len(KINDS) or preset_code >= len(PRESET_NAMES) or dtype != _FLOAT32:
        raise CodecError(f"unknown kind {kind_code}, preset {preset_code} or dtype {dtype} in the header")
    if total != size:
        raise CodecError(f"{'truncated' if size < total else 'trailing bytes'}: {size} bytes, the header says {total}")
    try:
        check_shape(frames, height, width)
    except ValueError as error:
        raise CodecError(f"header: {error}") from None
    kind = KINDS[kind_code]
    row = row_type(kind)
    end = start + frames * row.itemsize
    if size < end:
        raise CodecError(f"truncated: {size} bytes, the table of {frames} frames ends at {end}")
    (crc,) = _CRC.unpack_from(data, _FIXED.size)
    view = memoryview(data)
    found = zlib.crc32(view[start:end], zlib.crc32(view[: _FIXED.size]))
    if crc != found:
        raise CodecError(f"the header is damaged: its CRC is {found:08x} instead of {crc:08x}")
    table = np.frombuffer(data, row, frames, start)
    lengths = table["plane_bytes"].astype(np.int64) + table["mask_bytes"]
    offsets = end + np.concatenate(([0], np.cumsum(lengths)))
    if offsets[-1] != size:
        raise CodecError(f"the frame table ends at byte {offsets[-1]} of a file of {size}")
    lossy = table["mode"] == LOSSY
    broken = (table["mode"] > LOSSLESS) | (lossy != (table["mask_bytes"] == 0))
    broken |= ~np.isfinite(table["parameters"]).all(axis=1)
    if broken.any():
        frame = int(np.argmax(broken))
        raise CodecError(f"frame {frame}: impossible table row {table[frame]}")
    return Header(kind, PRESET_NAMES[preset_code], frames, height, width, table, offsets)


def frame_chunks(data: Buffer, header: Header, frame: int) -> tuple[memoryview, memoryview]:
    """The plane and mask chunks of one frame, their CRC checked."""
    start, end = int(header.offsets[frame]), int(header.offsets[frame + 1])
    row, view = header.table[frame], memoryview(data)[start:end]
    found = zlib.crc32(view)
    if found != row["crc"]:
        raise CodecError(
            f"frame {frame} (bytes {start}..{end}) is damaged: CRC {found:08x} instead of {row['crc']:08x}"
        )
    return view[: row["plane_bytes"]], view[row["plane_bytes"] :]
