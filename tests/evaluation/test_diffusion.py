"""The velocity's error by hand, and the ranges of the timestep."""

import pytest
import torch

from fw_train.evaluation.diffusion import BINS, bin_level, bin_name, velocity_error


def test_the_error_by_hand():
    """Two samples of two frames: the first is off by 1 and 3, the second by nothing."""
    target = torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]]])
    velocity = torch.tensor([[[1.0], [-2.0]], [[2.0], [3.0]]])
    assert velocity_error(velocity, target).tolist() == pytest.approx([(1 + 9) / 2, 0])
    assert velocity_error(velocity.bfloat16(), target).dtype == torch.float32


def test_ten_bins_cover_the_timesteps():
    assert [bin_level(index) for index in range(BINS)] == pytest.approx([0.05 + 0.1 * index for index in range(10)])
    assert (bin_name(0), bin_name(9)) == ("t0000-0100", "t0900-1000")
