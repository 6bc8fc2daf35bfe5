"""The torch decoder gives numpy's bits, after a trip through a worker too."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from data_tools.bench_codec import synthetic_clip
from fw_train.data.codec import (
    Codes,
    decode_codes,
    decode_depth,
    decode_points,
    encode_depth,
    encode_points,
    reconstruct,
)
from fw_train.data.codec_planes import delta
from fw_train.data.codec_torch import CodeTensors, as_tensors, expand

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def assert_same_bits(labels, expected):
    """Labels of torch against planes [N, P, H, W] and validity of numpy."""
    planes, valid = expected
    ours = labels.values.cpu().numpy().reshape(planes.shape)
    np.testing.assert_array_equal(ours.view(np.uint32), np.ascontiguousarray(planes).view(np.uint32))
    np.testing.assert_array_equal(labels.valid.cpu().numpy(), valid)
    assert (labels.values.dtype, labels.valid.dtype) == (torch.float32, torch.bool)


@pytest.fixture(scope="module")
def spoiled():
    """Depth and points with holes, noise and a lossless frame."""
    rng = np.random.default_rng(0)
    clip = synthetic_clip(4, 70, 90, fov_deg=90)
    depth = clip.depth * (1 + 0.01 * rng.standard_normal(clip.depth.shape, dtype=np.float32))
    points = clip.points * (1 + 0.01 * rng.standard_normal(clip.points.shape, dtype=np.float32))
    depth[rng.random(depth.shape) < 0.2] = np.nan
    points[rng.random(depth.shape) < 0.2] = np.inf
    depth[2, 0, 0], points[1, 0, 0] = 1e-20, -1e30
    return depth, points


@on_each_device
@pytest.mark.parametrize("preset", ["default", "tight", "lossless"])
@pytest.mark.parametrize("frames", [None, [3, 1, 1], [2], []])
def test_torch_equals_numpy_bit_for_bit(spoiled, device, preset, frames):
    depth, points = spoiled
    data = encode_depth(depth, preset=preset).data
    labels = expand(decode_codes(data, frames), device)
    values, valid = decode_depth(data, frames)
    assert_same_bits(labels, (values[:, None], valid))
    data = encode_points(points, preset=preset).data
    labels = expand(decode_codes(data, frames), device)
    values, valid = decode_points(data, frames)
    assert labels.values.shape[1:] == (3, 70, 90)
    assert_same_bits(labels, (np.moveaxis(values, 3, 1), valid))


def random_codes(kind, planes, parameters, step=1e-3):
    frames, _, height, width = planes.shape
    nothing = np.zeros((0, planes.shape[1], height, width), np.float32)
    deltas = np.stack([delta(frame) for frame in planes])
    at = np.arange(frames)
    return Codes(kind, step, at, deltas, parameters, at[:0], nothing, np.zeros((0, height, width), bool))


@on_each_device
def test_every_code_expands_to_the_same_bits(device):
    planes = np.arange(65536, dtype=np.uint16).reshape(1, 1, 256, 256)
    for step in (1e-3, 2e-4):
        codes = random_codes("depth", planes, np.float32([[0.123456]]), step)
        assert_same_bits(expand(codes, device), reconstruct(codes))


@on_each_device
@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 32767, 32768, 65535, None]),
)
def test_any_point_codes_expand_to_the_same_bits(device, shape, seed, extreme):
    rng = np.random.default_rng(seed)
    frames, height, width = shape
    planes = rng.integers(0, 65536, (frames, 3, height, width), np.uint16)
    if extreme is not None:
        planes[rng.random(planes.shape) < 0.5] = extreme
    planes[:, 0] = np.minimum(planes[:, 0], 20000)  # about what fits float32 after products
    parameters = rng.standard_normal((frames, 14)).astype(np.float32)
    codes = random_codes("points", planes, parameters)
    assert_same_bits(expand(codes, device), reconstruct(codes))


@on_each_device
def test_sums_of_a_long_row_stay_exact(device):
    planes = np.zeros((1, 1, 2, 16384), np.uint16)
    planes[..., ::2] = 32768  # every delta is the largest there is
    codes = random_codes("depth", planes, np.float32([[1]]))
    assert codes.deltas.max() == 65535
    assert_same_bits(expand(codes, device), reconstruct(codes))


def test_tensors_share_the_arrays_memory(spoiled):
    codes = decode_codes(encode_depth(spoiled[0]).data)
    tensors = as_tensors(codes)
    assert tensors.deltas.data_ptr() == codes.deltas.ctypes.data
    assert (tensors.kind, tensors.log_step, tensors.deltas.dtype) == ("depth", 1e-3, torch.uint16)


class OneFile(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return as_tensors(decode_codes(self.data, [index, 2]))


def test_codes_survive_the_hand_over_from_a_worker(spoiled):
    data = encode_points(spoiled[1]).data
    for index, tensors in enumerate(DataLoader(OneFile(data), batch_size=None, num_workers=1)):
        assert isinstance(tensors, CodeTensors)
        assert_same_bits(expand(tensors, "cpu"), reconstruct(decode_codes(data, [index, 2])))
