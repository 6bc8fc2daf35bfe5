"""Codes, deltas and chunks of single planes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_train.data.codec_planes import (
    CannotHold,
    CodecError,
    compress,
    decompress_into,
    delta,
    exp_table,
    log_codes,
    undelta,
)


def test_table_values():
    table = exp_table(1e-3)
    assert table.dtype == np.float32
    assert (table[0], table[1]) == (0, 1)
    np.testing.assert_array_equal(table[[2, 1001, 65535]], np.float32([1.0010005, 2.7182817, 2.89104315e28]))
    with pytest.raises(ValueError, match="read-only"):
        table[3] = 1


def test_codes_of_known_values():
    values = np.float32([[2.0, 2.0 * np.exp(0.0104), 0.0], [2.0 * np.e, 2.0 * np.exp(0.0106), 7.0]])
    valid = np.array([[True, True, False], [True, True, False]])
    codes, scale = log_codes(values, valid, 1e-3)
    assert scale == 2
    np.testing.assert_array_equal(codes, [[1, 11, 0], [1001, 12, 0]])


@pytest.mark.parametrize("decades", [1, 6, 24])
def test_wide_ranges_round_as_well_as_narrow_ones(decades):
    values = 10.0 ** np.random.default_rng(0).uniform(-decades / 2, decades / 2, (300, 400))
    values = values.astype(np.float32)
    codes, scale = log_codes(values, np.ones(values.shape, bool), 1e-3)
    decoded = exp_table(1e-3)[codes] * scale
    assert np.abs(decoded / values.astype(np.float64) - 1).max() <= 5.01e-4


@pytest.mark.parametrize("bad", [1e-13, 1e13, np.nan])
def test_values_out_of_range_cannot_be_held(bad):
    with pytest.raises(CannotHold, match=r"leave the range 1e-12..1e\+12"):
        log_codes(np.float32([[1, bad]]), np.ones((1, 2), bool), 1e-3)


def test_deltas_of_known_planes():
    plane = np.uint16([[[10, 12, 11], [10, 13, 65535], [0, 0, 0]]])
    # Along W: 10 2 -1 | 10 3 -14 | 0 0 0; then along H: 10 2 -1 | 0 1 -13 | -10 -3 14; then 2d or -2d - 1.
    expected = np.uint16([[[20, 4, 1], [0, 2, 25], [19, 5, 28]]])
    np.testing.assert_array_equal(delta(plane), expected)
    np.testing.assert_array_equal(undelta(expected), plane)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 40)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.uint16, np.uint32]),
)
def test_undelta_undoes_delta(shape, seed, dtype):
    rng = np.random.default_rng(seed)
    planes = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    planes[rng.random(shape[0]) < 0.3] = 0
    np.testing.assert_array_equal(undelta(delta(planes)), planes)
    np.testing.assert_array_equal(delta(undelta(planes)), planes)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("kind", ["zeros", "constant", "smooth", "random", "single"])
def test_chunks_keep_their_bytes(dtype, kind):
    rng = np.random.default_rng(0)
    planes = {
        "zeros": np.zeros((2, 30, 41), dtype),
        "constant": np.full((2, 30, 41), 7, dtype),
        "smooth": np.tile(np.arange(41, dtype=dtype), (2, 30, 1)),
        "random": rng.integers(0, np.iinfo(dtype).max, (2, 30, 41), dtype),
        "single": np.ones((1, 1, 1), dtype),
    }[kind]
    chunk = compress(planes)
    back = np.full_like(planes, 3)
    decompress_into(memoryview(chunk), back, "here")
    np.testing.assert_array_equal(back, planes)


def test_planes_larger_than_a_block():
    planes = np.random.default_rng(0).integers(0, 9, (1, 1200, 1000), np.uint16)
    back = np.empty_like(planes)
    decompress_into(memoryview(compress(planes)), back, "here")
    np.testing.assert_array_equal(back, planes)


# Byte offsets in a blosc2 chunk header.
TYPESIZE, NBYTES, CBYTES, FILTERS, CODEC, SPECIAL = 3, 4, 12, 16, 22, 31


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (NBYTES + 3, 0x7F, r"frame 3: the chunk declares 2130\d+ bytes where the frame needs 2000"),
        (NBYTES, 0, r"frame 3: the chunk declares 1792 bytes where the frame needs 2000"),
        (CBYTES + 1, 0x7F, r"frame 3: the chunk declares a length of \d+ bytes and has"),
        (TYPESIZE, 1, "not packed as geo1 packs it"),
        (FILTERS, 1, "not packed as geo1 packs it"),
        (FILTERS + 1, 33, "not packed as geo1 packs it"),
        (CODEC, 200, "not packed as geo1 packs it"),
        (SPECIAL, 0x01, "not packed as geo1 packs it"),  # with a dictionary
        (SPECIAL, 0x40, "not packed as geo1 packs it"),  # "uninitialised": would hand out whatever memory holds
    ],
)
def test_foreign_chunks_are_refused_unopened(offset, value, message):
    planes = np.arange(1000, dtype=np.uint16).reshape(1, 10, 100)
    chunk = bytearray(compress(planes))
    chunk[offset] = value
    untouched = np.full_like(planes, 77)
    with pytest.raises(CodecError, match=message):
        decompress_into(memoryview(chunk), untouched, "frame 3")
    assert (untouched == 77).all()


def test_a_chunk_for_a_larger_frame_is_refused_unopened():
    bomb = compress(np.zeros((1, 4000, 4000), np.uint16))  # 32 bytes for 32 MB
    with pytest.raises(CodecError, match=r"frame 0: the chunk declares 32000000 bytes where the frame needs 8"):
        decompress_into(memoryview(bomb), np.zeros((1, 2, 2), np.uint16), "frame 0")


def test_spoiled_payloads_are_refused_or_harmless():
    planes = np.random.default_rng(0).integers(0, 40, (1, 20, 33), np.uint16)
    chunk, refused = compress(planes), 0
    for offset in range(len(chunk)):
        spoiled = bytearray(chunk)
        spoiled[offset] ^= 0x40
        try:
            decompress_into(memoryview(spoiled), np.empty_like(planes), "frame 0")
        except CodecError:
            refused += 1
    assert refused > 20
    with pytest.raises(CodecError, match="a chunk of 31 bytes is shorter than its 32-byte header"):
        decompress_into(memoryview(chunk[:31]), planes, "frame 0")
