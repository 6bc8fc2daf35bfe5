"""The label codec through its front door: bounds, masks, presets, fall-back, frame choice, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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

BOUND = {"default": 5.01e-4, "tight": 1.02e-4}
POINT_BOUND = {"default": 7e-4, "tight": 1.4e-4}
lossy = pytest.mark.parametrize("preset", ["default", "tight"])
sizes = st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 70))


def bits(values):
    return np.ascontiguousarray(values).view(np.uint32)


def random_depth(rng, shape, decades):
    return np.exp(rng.uniform(0, decades * np.log(10), shape)).astype(np.float32) * np.float32(1e-2)


def spoil(rng, values, share):
    """Replaces a share of the values by NaN, infinities, zeros and negatives."""
    bad = rng.choice(np.float32([np.nan, np.inf, -np.inf, 0, -0.0, -3]), values.shape)
    return np.where(rng.random(values.shape) < share, bad, values)


@pytest.fixture(scope="module")
def clip():
    return synthetic_clip(5, 96, 128, fov_deg=90)


@lossy
def test_depth_of_a_scene_is_small_and_close(clip, preset):
    encoded = encode_depth(clip.depth, preset=preset)
    depth, valid = decode_depth(encoded.data)
    error = np.abs(depth.astype(np.float64) / clip.depth - 1).max()
    assert valid.all()
    assert error <= BOUND[preset]
    report = encoded.report
    assert report.max_rel_error == pytest.approx(error, rel=1e-3)
    assert error > 0.9 * BOUND[preset] * 0.98  # the step is as wide as the bound allows
    assert (report.raw_bytes, report.encoded_bytes) == (clip.depth.nbytes, len(encoded.data))
    assert report.raw_bytes > 7 * report.encoded_bytes  # 15 at 336x592; edges weigh more in a small frame
    assert not report.fell_back
    assert report.why == ""


@lossy
@pytest.mark.parametrize("frame_of_reference", ["points", "own_points"])
def test_points_of_a_scene_are_small_and_close(clip, preset, frame_of_reference):
    points = getattr(clip, frame_of_reference)
    encoded = encode_points(points, preset=preset)
    decoded, valid = decode_points(encoded.data)
    distance = np.linalg.norm(clip.own_points.astype(np.float64), axis=-1)  # from the camera of each frame
    error = (np.linalg.norm(decoded - points.astype(np.float64), axis=-1) / distance).max()
    assert valid.all()
    assert error <= POINT_BOUND[preset]
    assert encoded.report.max_rel_error == pytest.approx(error, rel=1e-2)
    assert points.nbytes > 18 * len(encoded.data)  # no larger than the depth: the offsets of exact points are zero
    assert not encoded.report.fell_back


@lossy
@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_noisy_points_stay_within_the_bound(clip, preset, noise):
    rng = np.random.default_rng(0)
    points = clip.points * (1 + noise * rng.standard_normal(clip.points.shape, dtype=np.float32))
    encoded = encode_points(points, preset=preset)
    assert not encoded.report.fell_back
    decoded, _ = decode_points(encoded.data)
    centre = read_header(encoded.data).table["parameters"][:, None, None, 11:].astype(np.float64)
    error = np.linalg.norm(decoded - points.astype(np.float64), axis=-1) / np.linalg.norm(points - centre, axis=-1)
    assert 0.9 * POINT_BOUND[preset] < error.max() <= POINT_BOUND[preset]  # near it: the steps waste nothing


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.floats(0, 6), st.sampled_from(["default", "tight"]), st.floats(0, 1))
def test_any_depth_keeps_its_bound_and_its_validity(shape, seed, decades, preset, share):
    rng = np.random.default_rng(seed)
    depth = spoil(rng, random_depth(rng, shape, decades), share)
    mask = rng.random(shape) < 0.8
    encoded = encode_depth(depth, mask, preset=preset)
    decoded, valid = decode_depth(encoded.data)
    expected = mask & np.isfinite(depth) & (depth > 0)
    np.testing.assert_array_equal(valid, expected)
    assert not decoded[~valid].any()
    error = np.abs(decoded[valid].astype(np.float64) / depth[valid] - 1).max(initial=0)
    assert error <= BOUND[preset]
    assert error <= encoded.report.max_rel_error * (1 + 1e-3) + 1e-9
    if preset == "default":
        assert not encoded.report.fell_back  # six decades fit


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 2**32 - 1), st.sampled_from(["default", "tight"]), st.floats(0, 0.7), st.floats(0, 0.1))
def test_any_points_keep_their_bound_and_their_validity(shape, seed, preset, share, noise):
    rng = np.random.default_rng(seed)
    clip = synthetic_clip(*shape, fov_deg=rng.uniform(20, 90), seed=seed)
    points = clip.points + noise * rng.standard_normal(clip.points.shape).astype(np.float32)
    points = spoil(rng, points, share / 3)
    mask = rng.random(shape) < 0.9
    encoded = encode_points(points, mask, preset=preset)
    decoded, valid = decode_points(encoded.data)
    np.testing.assert_array_equal(valid, mask & np.isfinite(points).all(axis=-1))
    assert not decoded[~valid].any()
    header = read_header(encoded.data)
    for t, row in enumerate(header.table):
        truth = points[t][valid[t]].astype(np.float64)
        off = np.linalg.norm(decoded[t][valid[t]] - truth, axis=-1)
        if t in header.lossless_frames:
            assert not off.any()
        else:
            away = np.linalg.norm(truth - row["parameters"][11:], axis=-1)
            assert (off <= POINT_BOUND[preset] * away).all()


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 2**32 - 1))
def test_lossless_keeps_every_bit(shape, seed):
    rng = np.random.default_rng(seed)
    depth = rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)  # NaN payloads and denormals included
    mask = rng.random(shape) < 0.5
    encoded = encode_depth(depth, mask, preset="lossless")
    decoded, valid = decode_depth(encoded.data)
    np.testing.assert_array_equal(bits(decoded), bits(depth))
    np.testing.assert_array_equal(valid, mask & np.isfinite(depth) & (depth > 0))
    points = rng.integers(0, 2**32, (*shape, 3), dtype=np.uint32).view(np.float32)
    decoded, valid = decode_points(encode_points(points, mask, preset="lossless").data)
    np.testing.assert_array_equal(bits(decoded), bits(points))
    np.testing.assert_array_equal(valid, mask & np.isfinite(points).all(axis=-1))


def test_lossless_keeps_nan_payloads_and_shrinks_a_scene(clip):
    depth = clip.depth.copy()
    depth[0, :2, 0] = np.array([0x7FC12345, 0xFF812345], np.uint32).view(np.float32)
    encoded = encode_depth(depth, preset="lossless")
    np.testing.assert_array_equal(bits(decode_depth(encoded.data)[0])[0, :2, 0], [0x7FC12345, 0xFF812345])
    assert encoded.report.max_rel_error == 0
    assert not encoded.report.fell_back
    assert depth.nbytes > 1.7 * len(encoded.data)
    assert clip.points.nbytes > 1.7 * len(encode_points(clip.points, preset="lossless").data)


@pytest.mark.parametrize("preset", ["default", "tight", "lossless"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (2, 9, 1), (1, 2, 2), (1, 65, 33)])
def test_tiny_and_odd_sizes(preset, shape):
    depth = random_depth(np.random.default_rng(0), shape, 2)
    decoded, valid = decode_depth(encode_depth(depth, preset=preset).data)
    np.testing.assert_allclose(decoded, depth, rtol=5.01e-4)
    points = np.stack((depth, -depth, depth), axis=-1)
    decoded, valid = decode_points(encode_points(points, preset=preset).data)
    assert valid.shape == shape
    np.testing.assert_array_equal(decoded, points)  # a ray's worth of points has no camera: kept lossless


def test_a_frame_without_any_value():
    depth = np.full((2, 20, 30), np.nan, np.float32)
    depth[1] = 4
    encoded = encode_depth(depth)
    decoded, valid = decode_depth(encoded.data)
    assert not encoded.report.fell_back
    assert (valid[0].any(), valid[1].all(), decoded[0].any()) == (False, True, False)
    points = np.full((1, 20, 30, 3), np.nan, np.float32)
    encoded = encode_points(points)
    decoded, valid = decode_points(encoded.data)
    assert (valid.any(), decoded.any(), encoded.report.fell_back) == (False, False, False)


def test_only_the_frames_that_need_it_fall_back(clip):
    depth = clip.depth.copy()
    depth[1, 0, 0], depth[3, 0, 0] = 1e-30, 1e30
    encoded = encode_depth(depth)
    assert encoded.report.fell_back
    assert encoded.report.why.startswith("frames 1 of 5: distances 1e-30..")
    assert "frames 3 of 5: distances" in encoded.report.why
    np.testing.assert_array_equal(read_header(encoded.data).lossless_frames, [1, 3])
    decoded, _ = decode_depth(encoded.data)
    np.testing.assert_array_equal(decoded[[1, 3]], depth[[1, 3]])
    assert np.abs(decoded / depth - 1).max() <= 5.01e-4


def test_more_range_than_the_codes_hold_falls_back():
    depth = np.float32([[[1e-2, 1.2e4]]])  # 14 in the logarithm: 70,000 steps of 2e-4
    assert not encode_depth(depth).report.fell_back
    report = encode_depth(depth, preset="tight").report
    assert report.why == "frames 0 of 1: distances 0.01..1.2e+04 need more than 65535 codes at a step of 0.0002"


def test_fallen_back_frames_do_not_let_invalid_values_through(clip):
    depth = clip.depth.copy()
    depth[0, 0, :3] = np.nan, -1, 1e-30
    decoded, valid = decode_depth(encode_depth(depth).data)
    np.testing.assert_array_equal(decoded[0, 0, :3], np.float32([0, 0, 1e-30]))
    np.testing.assert_array_equal(valid[0, 0, :3], [False, False, True])


def test_points_behind_the_camera_fall_back_and_say_so(clip):
    points = clip.own_points.copy()
    points[2, 5, :7] *= -1
    report = encode_points(points).report
    assert report.why.startswith("frames 2 of 5: 7 points lie at or behind the fitted camera; mark them invalid if")
    masked = np.ones(points.shape[:3], bool)
    masked[2, 5, :7] = False
    assert not encode_points(points, masked).report.fell_back


def test_points_far_off_their_rays_fall_back_and_say_so(clip):
    points = clip.own_points.copy()
    points[1, 5, 6] = 500, 0, 0.01
    why = encode_points(points).report.why
    assert why.startswith("frames 1 of 5: a point is 319")
    assert "px off its pixel's ray; one camera did not see this" in why


def test_many_reasons_are_cut_short():
    depth = np.ones((9, 2, 2), np.float32)
    depth[:, 0, 0] = 1e-20 * 2.0 ** np.arange(9)
    why = encode_depth(depth).report.why
    assert why.count("leave the range") == 3
    assert why.endswith("; and 6 frames more")


def test_frames_in_any_order(clip):
    points = clip.points.copy()
    points[1, 0, 0] = 1e30  # one lossless frame among lossy ones
    for data, decode in ((encode_points(points).data, decode_points), (encode_depth(clip.depth).data, decode_depth)):
        whole, whole_valid = decode(data)
        for frames in ([3, 1, 4], [1], [4, 4, 0], [], np.array([2, 1])):
            some, some_valid = decode(data, frames)
            np.testing.assert_array_equal(some, whole[frames])
            np.testing.assert_array_equal(some_valid, whole_valid[frames])
    codes = decode_codes(encode_points(points).data, [3, 1, 4])
    np.testing.assert_array_equal(codes.lossy, [0, 2])
    np.testing.assert_array_equal(codes.lossless, [1])


@pytest.mark.parametrize("frames", [[5], [-1], [0, 99]])
def test_frames_outside_the_file_are_refused(clip, frames):
    with pytest.raises(ValueError, match=r"not in the file, which has frames 0 to 4"):
        decode_depth(encode_depth(clip.depth).data, frames)


def test_views_and_other_strides_encode_the_same(clip):
    flipped = clip.points[:, ::-1, ::2]
    assert encode_points(flipped).data == encode_points(flipped.copy()).data


def test_encoding_is_repeatable_and_leaves_its_input_alone(clip):
    points, depth = clip.points.copy(), clip.depth.copy()
    depth[0, 0] = np.nan
    kept = depth.copy()
    assert encode_depth(depth).data == encode_depth(depth).data
    assert encode_points(points).data == encode_points(points).data
    np.testing.assert_array_equal(depth, kept)
    np.testing.assert_array_equal(points, clip.points)


def test_bytearrays_and_views_decode_too(clip):
    data = encode_depth(clip.depth).data
    for other in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(decode_depth(other)[0], decode_depth(data)[0])


def test_wrong_arguments_are_refused_with_the_fix(clip):
    with pytest.raises(ValueError, match=r"depth must be float32, not float64; convert it"):
        encode_depth(clip.depth.astype(np.float64))
    with pytest.raises(ValueError, match=r"depth must be \[T, H, W\], not \[96, 128\]"):
        encode_depth(clip.depth[0])
    with pytest.raises(ValueError, match=r"points must be \[T, H, W, 3\], not \[5, 3, 96, 128\]"):
        encode_points(np.moveaxis(clip.points, -1, 1))
    with pytest.raises(ValueError, match=r"valid must be bool \[5, 96, 128\], not uint8 \[5, 96, 128\]"):
        encode_depth(clip.depth, np.ones(clip.depth.shape, np.uint8))
    with pytest.raises(ValueError, match=r"valid must be bool \[5, 96, 128\], not bool \[96, 128\]"):
        encode_points(clip.points, np.ones((96, 128), bool))
    with pytest.raises(ValueError, match=r"unknown preset 'loose'; use one of default, tight, lossless"):
        encode_depth(clip.depth, preset="loose")
    for shape in ((0, 4, 4), (1, 0, 4), (1, 1, 16385)):
        with pytest.raises(ValueError, match=r"outside geo1's limits"):
            encode_depth(np.ones(shape, np.float32))
    with pytest.raises(CodecError, match=r"the file holds depth; decode it with decode_depth"):
        decode_points(encode_depth(clip.depth).data)
