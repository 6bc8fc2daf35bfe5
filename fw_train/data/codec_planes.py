"""Integer planes that compress well: logarithmic codes, 2-D deltas, and the blosc2 chunks that hold them.

Axes: H x W pixels of one frame.
"""

import struct
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import TypeVar

import blosc2
import numpy as np
from numpy.typing import NDArray

MAX_CODE = 65535  # code 0 says "no value here", values take 1..65535
# Lossy values stay in this range: squares and products of them are normal float32 numbers on every device.
SMALLEST, LARGEST = 1e-12, 1e12
# A float32 logarithm misplaces a rounding tie by about its own ulp, which shows in the error bound beyond this ratio.
FLOAT32_LOG_RATIO = 50.0

Unsigned = TypeVar("Unsigned", np.uint16, np.uint32)


class CodecError(ValueError):
    """An encoded label array that cannot be read: what is wrong, and where."""


class CannotHold(ValueError):
    """Why the lossy code cannot hold a frame within its bound; the encoder then keeps that frame lossless."""


def strips(height: int) -> Iterator[slice]:
    """Row ranges to work through a frame in: temporaries then stay in cache, which is three to five times faster."""
    return (slice(top, top + 64) for top in range(0, height, 64))


@cache
def exp_table(step: float) -> NDArray[np.float32]:
    """float32 [65536]: exp((code - 1) * step), 0 for code 0; every decoder multiplies by these very numbers."""
    table = np.exp((np.arange(MAX_CODE + 1, dtype=np.float64) - 1) * step).astype(np.float32)
    table[0] = 0
    table.flags.writeable = False
    return table


def log_codes(
    values: NDArray[np.float32], valid: NDArray[np.bool_], step: float
) -> tuple[NDArray[np.uint16], np.float32]:
    """Codes [H, W], 0 where not valid, and a scale: `exp_table(step)[code] * scale` is half a step off at most."""
    codes = np.zeros(values.shape, np.uint16)
    if not valid.any():
        return codes, np.float32(1)
    filled = values if valid.all() else np.where(valid, values, values.flat[np.argmax(valid)])
    low, high = filled.min(), filled.max()
    if not (low >= SMALLEST and high <= LARGEST):
        raise CannotHold(f"distances {low:.3g}..{high:.3g} leave the range {SMALLEST:g}..{LARGEST:g}")
    ratio = float(high) / float(low)
    if np.log(ratio) / step > MAX_CODE - 1:
        raise CannotHold(f"distances {low:.3g}..{high:.3g} need more than {MAX_CODE} codes at a step of {step:g}")
    precise: type[np.floating] = np.float32 if ratio <= FLOAT32_LOG_RATIO else np.float64
    for rows in strips(len(values)):
        scaled = filled[rows].astype(precise)
        np.divide(scaled, low, out=scaled)
        np.log(scaled, out=scaled)
        np.divide(scaled, step, out=scaled)
        codes[rows] = np.rint(scaled, out=scaled)
    codes += 1
    codes *= valid
    return codes, low


def delta(planes: NDArray[Unsigned]) -> NDArray[Unsigned]:
    """Differences of [P, H, W] along W, then H, modulo the type's range; zigzagged, so that either sign stays small."""
    deltas = np.zeros_like(planes)
    for plane, coded in zip(planes, deltas, strict=True):
        if not plane.any():  # the pixel offsets of points that are exactly an unprojected depth map
            continue
        across = plane.copy()
        across[:, 1:] -= plane[:, :-1]
        down = across.copy()
        down[1:] -= across[:-1]
        np.negative(down >> (8 * planes.itemsize - 1), out=coded)  # all ones where the difference is negative
        coded ^= down << 1
    return deltas


def undelta(deltas: NDArray[Unsigned]) -> NDArray[Unsigned]:
    """The planes [P, H, W] whose `delta` this is."""
    planes = np.zeros_like(deltas)
    for coded, plane in zip(deltas, planes, strict=True):
        if not coded.any():
            continue
        np.negative(coded & 1, out=plane)
        plane ^= coded >> 1
        for above, row in pairwise(plane):  # cumsum along this axis takes twice as long
            row += above
        for rows in strips(len(plane)):
            plane[rows] = np.cumsum(plane[rows], axis=1, dtype=np.uint32)  # sums in uint16 take three times as long
    return planes


# blosc2's chunk header: version, codec version, flags, type size, byte counts (plain, block, chunk), filters, codec,
# codec meta, filter metas, reserved, special flags.
_CHUNK = struct.Struct("<BBBBIII6sBB6sBB")
_FLAG_STORED, _ZSTD_FORMAT, _ZSTD = 0x02, 4, int(blosc2.Codec.ZSTD.value)
_SPECIAL_NONE, _SPECIAL_ZEROS = 0x00, 0x10
_MAX_BLOCK = 1 << 20  # up to here a plane is one block: smaller and faster than blosc2's own choice
# Bit planes suit deltas of a few codes; in deltas of float32 bits the upper bytes are zero and the lowest is noise.
_FILTERS = {1: blosc2.Filter.SHUFFLE, 2: blosc2.Filter.BITSHUFFLE, 4: blosc2.Filter.SHUFFLE}


def compress(planes: NDArray[np.unsignedinteger]) -> bytes:
    """One blosc2 chunk of [..., H, W], made by the calling thread alone."""
    plane_bytes = planes.itemsize * planes.shape[-2] * planes.shape[-1]
    return blosc2.compress2(
        np.ascontiguousarray(planes),
        codec=blosc2.Codec.ZSTD,
        clevel=1,
        filters=[_FILTERS[planes.itemsize]],
        filters_meta=[0],
        typesize=planes.itemsize,
        blocksize=min(plane_bytes, _MAX_BLOCK),
        nthreads=1,
    )


def decompress_into(chunk: memoryview, planes: NDArray[np.unsignedinteger], where: str) -> None:
    """Fills the contiguous `planes`; a chunk that declares another size or packing is refused before it is unpacked."""
    if len(chunk) < _CHUNK.size:
        raise CodecError(f"{where}: a chunk of {len(chunk)} bytes is shorter than its {_CHUNK.size}-byte header")
    header = bytes(chunk[: _CHUNK.size])
    _, _, flags, typesize, nbytes, _, cbytes, filters, codec, codec_meta, metas, _, special = _CHUNK.unpack(header)
    if nbytes != planes.nbytes:
        raise CodecError(f"{where}: the chunk declares {nbytes} bytes where the frame needs {planes.nbytes}")
    if cbytes != len(chunk):
        raise CodecError(f"{where}: the chunk declares a length of {cbytes} bytes and has {len(chunk)}")
    ours = (
        typesize == planes.itemsize
        and (flags >> 5 == _ZSTD_FORMAT or flags & _FLAG_STORED)
        and filters == bytes([_FILTERS[planes.itemsize].value, 0, 0, 0, 0, 0])
        and (codec, codec_meta, metas) == (_ZSTD, 0, bytes(6))
        and special in (_SPECIAL_NONE, _SPECIAL_ZEROS)
    )
    if not ours:
        raise CodecError(f"{where}: the chunk is not packed as geo1 packs it; its header is {header.hex()}")
    try:
        blosc2.decompress2(chunk, planes, nthreads=1)
    except (RuntimeError, ValueError) as error:
        raise CodecError(f"{where}: blosc2 cannot unpack the chunk ({error})") from error
