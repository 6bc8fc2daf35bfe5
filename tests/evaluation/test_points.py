"""Point metrics, by hand on two points and against brute force; the alignment against Horn's quaternions."""

import numpy as np
import pytest
import torch

from fw_train.evaluation.points import align_points, point_errors


def random_points(seed, count=40):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_errors_by_hand():
    """On a line: predicted 0 and 0.5, true 0 and 4. To the nearest true: 0 and 0.5. To the nearest predicted: 0 and 3.5."""
    prediction, label = (torch.tensor([[0.0, 0, 0], [x, 0, 0]]) for x in (0.5, 4.0))
    errors = point_errors(prediction, label)
    assert errors.accuracy.item() == pytest.approx(0.25)
    assert errors.completeness.item() == pytest.approx(1.75)
    assert errors.chamfer.item() == pytest.approx(1.0)
    assert errors.pixel.item() == pytest.approx(1.75)


def test_errors_are_those_of_all_distances():
    prediction, label = random_points(0, 37), random_points(1, 37)
    distance = np.linalg.norm(prediction.numpy()[:, None] - label.numpy()[None], axis=-1)
    errors = point_errors(prediction, label)
    assert errors.accuracy.item() == pytest.approx(distance.min(1).mean())
    assert errors.completeness.item() == pytest.approx(distance.min(0).mean())
    assert errors.pixel.item() == pytest.approx(distance.diagonal().mean())


def test_clouds_are_sets_except_for_their_pixels():
    label = random_points(2)
    errors = point_errors(label.flip(0), label)
    assert errors.chamfer.item() == 0
    assert errors.pixel.item() > 1


def horn(source, target):
    """Horn's closed form: the rotation is the quaternion of the largest eigenvalue."""
    a, b = source - source.mean(0), target - target.mean(0)
    s = a.T @ b
    d = s - s.T
    n = np.zeros((4, 4))
    n[0, 0], n[0, 1:] = np.trace(s), (d[1, 2], d[2, 0], d[0, 1])
    n[1:, 0], n[1:, 1:] = n[0, 1:], s + s.T - np.trace(s) * np.eye(3)
    w, x, y, z = np.linalg.eigh(n)[1][:, -1]
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    scale = (b * (a @ rotation.T)).sum() / (a**2).sum()
    return scale * a @ rotation.T + target.mean(0)


@pytest.mark.parametrize("seed", range(4))
def test_the_alignment_is_horns(seed):
    prediction = random_points(seed)
    label = prediction + 0.5 * random_points(seed + 10)
    np.testing.assert_allclose(
        align_points(prediction, label).numpy(), horn(prediction.numpy(), label.numpy()), atol=1e-9
    )


def test_a_known_similarity_leaves_no_error():
    label = random_points(5)
    turn, _ = torch.linalg.qr(random_points(6, 3))
    turn = turn * torch.linalg.det(turn)
    moved = 2.5 * label @ turn.mT + torch.tensor([1.0, -2, 3], dtype=torch.float64)
    assert point_errors(moved, label).chamfer > 0.5
    errors = point_errors(align_points(moved, label), label)
    assert max(value.item() for value in errors) < 1e-9
