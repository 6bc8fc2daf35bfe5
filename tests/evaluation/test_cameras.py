"""Camera metrics, by hand on two frames, and the AUC against a histogram of all pairs."""

import math

import numpy as np
import pytest
import torch

from fw_train.evaluation.cameras import camera_errors
from fw_train.geometry import rigid

F64 = torch.float64
STILL = torch.eye(4, dtype=F64)


def turned(axis, degrees):
    angle = math.radians(degrees)
    x, y, z = axis
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=F64)
    return torch.matrix_exp(angle * cross)


def two(rotation, translation):
    """The first camera at rest, and a second one."""
    return torch.stack((STILL, rigid(rotation, torch.tensor(translation, dtype=F64))))


def random_path(seed, frames=9):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.nn.functional.normalize(torch.randn(frames, 3, generator=generator, dtype=F64), dim=-1)
    rotations = torch.stack([turned(axis.tolist(), 15 * number) for number, axis in enumerate(axes)])
    return rigid(rotations, torch.randn(frames, 3, generator=generator, dtype=F64))


def test_errors_by_hand():
    """The second camera should go ahead; it goes 19.5 degrees to the side, twice as far, and turns by 10.5 degrees too much."""
    true = two(turned((0, 1, 0), 5), [0.0, 0, 1])
    side = math.radians(19.5)
    predicted = two(turned((0, 1, 0), 15.5), [2 * math.sin(side), 0, 2 * math.cos(side)])
    errors = camera_errors(predicted, true)
    assert errors.rotation_deg.item() == pytest.approx(10.5)
    assert errors.translation_deg.item() == pytest.approx(19.5)
    assert errors.auc30.item() == pytest.approx(11 / 30)  # the larger angle is below the thresholds 20 to 30
    assert errors.ate.item() == pytest.approx(0, abs=1e-9)  # a similarity maps any two centres onto any two


def test_the_larger_angle_counts_in_bins_of_a_degree():
    """Recall is 0 below 10.5 degrees and 1 from the threshold of 11 on: 20 of the 30 thresholds."""
    true, predicted = two(turned((1, 0, 0), 0), [1.0, 0, 0]), two(turned((1, 0, 0), 10.5), [1.0, 0, 0])
    assert camera_errors(predicted, true).auc30.item() == pytest.approx(20 / 30)


def test_going_backwards_is_no_error_for_vggts_measure_alone():
    true, predicted = two(torch.eye(3, dtype=F64), [0.0, 0, 1]), two(torch.eye(3, dtype=F64), [0.0, 0, -1])
    errors = camera_errors(predicted, true)
    assert errors.translation_deg.item() == pytest.approx(180)
    assert errors.auc30.item() == 1
    assert errors.auc30_signed.item() == 0


def angle_deg(a, b, *, signed=True):
    cosine = float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    return math.degrees(math.acos(np.clip(cosine if signed else abs(cosine), -1, 1)))


def test_errors_are_those_of_a_histogram_over_all_pairs():
    true, predicted = random_path(0), random_path(0)
    predicted[:, :3, 3] += 0.15 * random_path(1)[:, :3, 3]
    predicted[:, :3, :3] @= torch.stack([turned((0, 0, 1), frame * frame / 8) for frame in range(9)])
    rotations, translations, worst = [], [], []
    for i in range(9):
        for j in range(i + 1, 9):
            a, b = (np.linalg.inv(path[i].numpy()) @ path[j].numpy() for path in (predicted, true))
            rotations.append(math.degrees(math.acos(np.clip((np.trace(a[:3, :3].T @ b[:3, :3]) - 1) / 2, -1, 1))))
            translations.append(angle_deg(a[:3, 3], b[:3, 3]))
            worst.append(max(rotations[-1], angle_deg(a[:3, 3], b[:3, 3], signed=False)))
    counts, _ = np.histogram(worst, bins=np.arange(31))
    errors = camera_errors(predicted, true)
    assert 0.1 < errors.auc30.item() < 0.95
    assert errors.auc30.item() == pytest.approx(np.mean(np.cumsum(counts / len(worst))))
    assert errors.rotation_deg.item() == pytest.approx(np.mean(rotations), abs=1e-4)
    assert errors.translation_deg.item() == pytest.approx(np.mean(translations), abs=1e-4)


def test_the_trajectory_error_by_hand():
    """A right angle taken for a straight line: centres (0,0), (1,0), (1,1) predicted as -1, 0, 1 along the diagonal.

    The best similarity of the line keeps the part of each true centre along the diagonal: 0, 1/2, 1 of its length sqrt 2.
    What is left is the distance of the corner and a third of it: h = sqrt 1/2 off the line, spread as 2/3 h and twice 1/3 h.
    """
    eye = torch.eye(3, dtype=F64).expand(3, 3, 3)
    true = rigid(eye, torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=F64))
    predicted = rigid(eye, torch.tensor([[-1.0, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=F64))
    h = math.sqrt(0.5)
    expected = math.sqrt(((2 / 3 * h) ** 2 + 2 * (1 / 3 * h) ** 2) / 3)
    assert camera_errors(predicted, true).ate.item() == pytest.approx(expected)


def test_a_perfect_path_and_a_moved_and_scaled_one():
    true = random_path(3)
    perfect = camera_errors(true, true)
    move = random_path(4)[5]
    moved = move @ true
    moved[:, :3, 3] *= 3
    for errors in (perfect, camera_errors(moved, true)):
        assert max(errors.rotation_deg, errors.translation_deg, errors.ate).item() < 1e-5
        assert (errors.auc30.item(), errors.auc30_signed.item()) == (1, 1)
