"""The geo1 file: what version 1 wrote stays readable, and damage or malice ends in one clear error."""

import base64
import struct
import zlib

import numpy as np
import pytest

from data_tools.bench_codec import synthetic_clip
from fw_train.data.codec import (
    CodecError,
    decode_codes,
    decode_depth,
    decode_points,
    encode_depth,
    encode_points,
    read_header,
)
from fw_train.data.codec_planes import compress

DEPTH_FILE = (
    "R0VPMQEAAAABAAAAAgAAAAIAAAADAAAAywAAAAAAAABUxla/ACwAAAAAAAAAvb8yWAAAgD8BOAAAACEAAACuvhlPAAAAAAUBBwIMAAAADAAAACwAAAACAAAA"
    "AAAFAAAAAAAAAAAAAgAqAysDagWVCAAgBQEHBBgAAAAYAAAAOAAAAAEAAAAAAAUAAAAAAAAAAAAQynk88DUGRAAAgADwNcZE7zVGxQAAQIEFAQcBAQAAAAEA"
    "AAAhAAAAAQAAAAAABQAAAAAAAAAAAPQ="
)
POINTS_FILE = (
    "R0VPMQEAAQABAAAAAQAAAAMAAAAEAAAA0QAAAAAAAAB7rQnSAGgAAAAAAAAALjpm4FIM8z8zg/Y6kOyBPi0IVrvNk8W+XkKmunJpgT4PdX2+O/WTPOtUM7u2"
    "Qno/woEiPUDJRrzNsSc9BQGXAkgAAAAYAAAAaAAAAAIAAAAAAAUAAAAAAAAAAABwACsAGwAlAAQAQAM+AnsFBABGAokEOAIfALQAyQAwABAAswDWACcAEgAO"
    "AB8AAwASAA8ACwANAA0ADAAOACAAEwAGAB4AIwA="
)
POINT_BITS = [
    [[3208641293, 3204448844, 1073745825], [3189371976, 3204441294, 1073740402]],
    [[1048581547, 3204456998, 1073745893], [1061156792, 3204451026, 1073741762]],
    [[3208647742, 968378912, 1073741789], [3200264878, 3111544768, 1077935684]],
    [[1056946848, 967897152, 1082130909], [1061160167, 3115975168, 1073745075]],
    [[3208637415, 1056960122, 1073734490], [3204413882, 1065355908, 1082124686]],
    [[1052759477, 1061169235, 1077941603], [0, 0, 0]],
]
HEADER, ROW = 36, {"depth": 17, "points": 69}
VERSION, KIND, PRESET, DTYPE, FRAMES, HEIGHT, WIDTH, LENGTH, CRC = 4, 6, 7, 8, 12, 16, 20, 24, 32
MODE, PLANE_BYTES, MASK_BYTES, CHUNK_CRC, PARAMETERS = 0, 1, 5, 9, 13


def test_depth_files_of_version_1_stay_readable():
    data = base64.b64decode(DEPTH_FILE)
    depth, valid = decode_depth(data)
    expected = [[[1, 1.4993025, 0], [1.9997057, 0, 40.004822]], [[1e-20, 3, 4], [5, 0, 7]]]
    np.testing.assert_array_equal(depth, np.float32(expected))
    np.testing.assert_array_equal(valid, np.float32(expected) > 0)
    header = read_header(data)
    assert header[:5] == ("depth", "default", 2, 2, 3)
    np.testing.assert_array_equal(header.lossless_frames, [1])
    np.testing.assert_array_equal(header.offsets, [70, 114, 203])


def test_point_files_of_version_1_stay_readable():
    points, valid = decode_points(base64.b64decode(POINTS_FILE))
    np.testing.assert_array_equal(points.view(np.uint32).reshape(6, 2, 3), POINT_BITS)
    np.testing.assert_array_equal(valid, points[..., 2] > 0)


def small_files():
    """Both kinds, each with a lossy and a lossless frame."""
    clip = synthetic_clip(2, 5, 7)
    depth, points = clip.depth.copy(), clip.points.copy()
    depth[1, 0, 0], points[1, 0, 0] = 1e-20, 1e30
    return {"depth": encode_depth(depth).data, "points": encode_points(points).data}


@pytest.fixture(scope="module", params=["depth", "points"])
def small_file(request):
    data = small_files()[request.param]
    assert len(read_header(data).lossless_frames) == 1
    return data


def decode_all(data):
    """Every way into a file; the planes of both kinds, for comparison."""
    kind = read_header(data).kind
    codes = decode_codes(data)
    values, valid = decode_depth(data) if kind == "depth" else decode_points(data)
    return [codes.deltas, codes.parameters, codes.exact, codes.exact_valid, values, valid]


def test_every_flipped_byte_is_noticed(small_file):
    for at in range(len(small_file)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(small_file)
            damaged[at] ^= flip
            with pytest.raises(CodecError):
                decode_all(damaged)


def test_every_truncation_is_noticed(small_file):
    for length in range(len(small_file)):
        with pytest.raises(CodecError, match=r"truncated: \d+ bytes"):
            read_header(small_file[:length])
    with pytest.raises(CodecError, match=r"trailing bytes: \d+ bytes, the header says \d+"):
        read_header(small_file + b"\0")


def test_damage_in_one_frame_leaves_the_others_readable(small_file):
    header = read_header(small_file)
    damaged = bytearray(small_file)
    damaged[header.offsets[0] + 40] ^= 1
    start, end = header.offsets[:2]
    with pytest.raises(CodecError, match=rf"frame 0 \(bytes {start}..{end}\) is damaged: CRC [0-9a-f]{{8}}"):
        decode_codes(damaged)
    np.testing.assert_array_equal(decode_codes(damaged, [1]).exact, decode_codes(small_file, [1]).exact)


def forge(data, changes, kind="depth"):
    """Writes (offset, format, value) into a file and makes its header's CRC right again."""
    forged = bytearray(data)
    for offset, form, value in changes:
        struct.pack_into("<" + form, forged, offset, value)
    frames = struct.unpack_from("<I", forged, FRAMES)[0]
    table = forged[HEADER : HEADER + frames * ROW[kind]]
    struct.pack_into("<I", forged, CRC, zlib.crc32(table, zlib.crc32(forged[:CRC])))
    return bytes(forged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(0, "4s", b"GEO2")], r"not a geo1 file: it starts with b'GEO2' instead of b'GEO1'"),
        ([(VERSION, "H", 2)], r"geo1 version 2 is unknown to this reader, which knows 1"),
        ([(KIND, "B", 2)], r"unknown kind 2, preset 0 or dtype 1 in the header"),
        ([(PRESET, "B", 3)], r"unknown kind 0, preset 3 or dtype 1 in the header"),
        ([(DTYPE, "B", 2)], r"unknown kind 0, preset 0 or dtype 2 in the header"),
        ([(FRAMES, "I", 0)], r"0 frames of 5x7 are outside geo1's limits"),
        ([(FRAMES, "I", 2**32 - 1)], r"4294967295 frames of 5x7 are outside geo1's limits"),
        ([(FRAMES, "I", 2**20)], r"truncated: \d+ bytes, the table of 1048576 frames ends at 17825828"),
        ([(HEIGHT, "I", 2**31)], r"2 frames of 2147483648x7 are outside geo1's limits"),
        ([(WIDTH, "I", 0)], r"2 frames of 5x0 are outside geo1's limits"),
        ([(HEIGHT, "I", 16384), (WIDTH, "I", 16384)], r"2 frames of 16384x16384 are outside geo1's limits"),
        ([(LENGTH, "Q", 2**63)], r"truncated: \d+ bytes, the header says 9223372036854775808"),
        ([(HEADER + MODE, "B", 2)], r"frame 0: impossible table row"),
        ([(HEADER + MODE, "B", 1)], r"frame 0: impossible table row"),  # lossless without a mask
        ([(HEADER + 17 + MODE, "B", 2)], r"frame 1: impossible table row"),
        ([(HEADER + PLANE_BYTES, "I", 2**32 - 1)], r"the frame table ends at byte 429496\d+ of a file of \d+"),
        ([(HEADER + MASK_BYTES, "I", 1)], r"the frame table ends at byte \d+ of a file of \d+"),
        ([(HEADER + PARAMETERS, "f", np.nan)], r"frame 0: impossible table row"),
        ([(HEADER + PARAMETERS, "f", np.inf)], r"frame 0: impossible table row"),
    ],
)
def test_hostile_headers_are_refused(changes, message):
    with pytest.raises(CodecError, match=message):
        read_header(forge(small_files()["depth"], changes))


def test_a_larger_frame_than_the_chunks_hold_is_refused():
    data = forge(small_files()["depth"], [(HEIGHT, "I", 16000), (WIDTH, "I", 8000)])
    with pytest.raises(CodecError, match=r"frame 0: the chunk declares 70 bytes where the frame needs 256000000"):
        decode_depth(data)


def test_a_bomb_in_a_frame_is_refused_unopened():
    header = read_header(small_files()["depth"])
    bomb = compress(np.zeros((1, 9000, 9000), np.uint16))
    table = struct.pack("<BIIIf", 0, len(bomb), 0, zlib.crc32(bomb), 1.0)
    fixed = struct.pack("<4sHBBB3xIIIQI", b"GEO1", 1, 0, 0, 1, 1, header.height, header.width, HEADER + 17 + 32, 0)
    data = forge(fixed + table + bomb, [])
    assert read_header(data).frames == 1
    with pytest.raises(CodecError, match=r"frame 0: the chunk declares 162000000 bytes where the frame needs 70"):
        decode_depth(data)


def test_a_mask_of_another_size_is_refused():
    data = encode_depth(np.ones((1, 5, 7), np.float32), preset="lossless").data
    chunk = data[HEADER + 17 :][: read_header(data).table["plane_bytes"][0]]
    mask = compress(np.zeros((1, 6), np.uint8))
    crc = zlib.crc32(mask, zlib.crc32(chunk))
    table = struct.pack("<BIIIf", 1, len(chunk), len(mask), crc, 0.0)
    total = HEADER + 17 + len(chunk) + len(mask)
    data = forge(data[:HEADER] + table + chunk + mask, [(LENGTH, "Q", total)])
    with pytest.raises(CodecError, match=r"frame 0, validity mask: the chunk declares 6 bytes where the frame needs 5"):
        decode_depth(data)


@pytest.mark.parametrize("data", [b"", b"GEO1", b"\0" * 500, b"\x93NUMPY" + b"\0" * 200, bytes(range(256)) * 4])
def test_other_files_are_refused(data):
    with pytest.raises(CodecError):
        decode_depth(data)
