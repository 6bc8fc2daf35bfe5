"""Depth metrics, by hand on two frames of two pixels, and against numpy."""

import math

import numpy as np
import pytest
import torch

from fw_train.evaluation.depth import align_scale_shift, depth_errors, depth_flicker

NAN = math.nan
LABEL = torch.tensor([[[1.0, 2.0]], [[4.0, NAN]]])
PREDICTION = torch.tensor([[[1.1, 2.0]], [[5.2, 9.0]]])
VALID = torch.tensor([[[True, True]], [[True, False]]])


def test_errors_by_hand():
    """Three pixels count: 1.1 for 1, 2 for 2, 5.2 for 4."""
    errors = depth_errors(PREDICTION, LABEL, VALID)
    assert errors.absrel.item() == pytest.approx((0.1 / 1 + 0 / 2 + 1.2 / 4) / 3, abs=1e-6)
    assert errors.rmse.item() == pytest.approx(math.sqrt((0.1**2 + 0 + 1.2**2) / 3), abs=1e-6)
    assert errors.delta1.item() == pytest.approx(2 / 3)  # the ratios are 1.1, 1 and 1.3


@pytest.mark.parametrize(("value", "within"), [(1.24, 1), (1.26, 0), (1 / 1.24, 1), (1 / 1.26, 0), (-1.0, 0)])
def test_a_depth_may_be_too_small_by_the_same_factor(value, within):
    one = torch.ones(1, 1, 1)
    assert depth_errors(value * one, one, one.bool()).delta1.item() == within


def test_flicker_by_hand():
    """Only the first pixel is valid in both frames: its relative error goes from 0.1 to 0.3."""
    assert depth_flicker(PREDICTION, LABEL, VALID).item() == pytest.approx(0.2, abs=1e-6)
    steady = torch.where(VALID, 1.5 * LABEL, NAN)
    assert depth_flicker(steady, LABEL, VALID).item() == pytest.approx(0, abs=1e-9)


def test_alignment_by_hand():
    """Depths 1, 2, 3 for 2, 4, 9: the slope is (1 * 3 + 1 * 4) / (1 + 1) = 3.5, the line goes through (2, 5)."""
    prediction = torch.tensor([[[1.0, 2.0]], [[3.0, NAN]]])
    label = torch.tensor([[[2.0, 4.0]], [[9.0, 1.0]]])
    assert align_scale_shift(prediction, label, VALID)[VALID].tolist() == pytest.approx([1.5, 5, 8.5])


def test_alignment_is_that_of_numpy_and_sees_valid_pixels_alone():
    generator = torch.Generator().manual_seed(0)
    prediction, label = torch.rand(2, 3, 6, 8, generator=generator) + 0.5
    valid = torch.rand(3, 6, 8, generator=generator) > 0.4
    x, y = prediction[valid].double().numpy(), label[valid].double().numpy()
    (scale, shift), *_ = np.linalg.lstsq(np.stack((x, np.ones_like(x)), axis=1), y, rcond=None)
    spoilt = torch.where(valid, prediction, NAN)
    aligned = align_scale_shift(spoilt, torch.where(valid, label, NAN), valid)
    np.testing.assert_allclose(aligned[valid].numpy(), scale * x + shift, rtol=1e-9)


def test_a_known_scale_and_shift_leave_no_error():
    label = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(1)) + 0.5
    errors = depth_errors(align_scale_shift(3 * label - 0.7, label, label > 0), label, label > 0)
    assert (errors.absrel.item(), errors.rmse.item()) == pytest.approx((0, 0), abs=1e-6)
    assert errors.delta1.item() == 1


def test_a_flat_prediction_becomes_the_mean():
    label = torch.tensor([[[1.0, 2.0]], [[6.0, 3.0]]])
    aligned = align_scale_shift(torch.full_like(label, 0.3), label, label > 0)
    assert aligned.flatten().tolist() == pytest.approx([3.0] * 4)
