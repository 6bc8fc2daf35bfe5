"""What is drawn is the middle frame of the clip, truth and prediction in the same units."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fw_train.batch import Batch, Prediction
from fw_train.evaluation.scenes import scene
from fw_train.geometry import encode_pose9, rigid

FRAMES, HEIGHT, WIDTH = 5, 3, 4


@pytest.fixture
def clip():
    """Depth, points and video tell the frame by their values; cameras move right, predicted ones left."""
    number = torch.arange(1.0, FRAMES + 1)[None, :, None, None]
    depth = number + 0.1 * torch.arange(WIDTH).expand(1, FRAMES, HEIGHT, WIDTH)
    valid = torch.ones_like(depth, dtype=torch.bool)
    valid[:, :, 0, 0] = False
    points = depth[:, :, None].expand(-1, -1, 3, -1, -1)
    centres = torch.zeros(FRAMES, 3)
    centres[:, 0] = torch.arange(FRAMES)
    paths = [
        encode_pose9(rigid(torch.eye(3).expand(FRAMES, 3, 3), sign * centres), torch.ones(FRAMES))[None]
        for sign in (1, -1)
    ]
    batch = Batch(latents=torch.zeros(1), text=torch.zeros(1), depth=depth, valid=valid, points=points, pose9=paths[0])
    return batch, Prediction(None, 2 * depth, 3 * points, torch.ones_like(depth), paths[1])


def test_the_middle_frame_is_shown(clip):
    batch, prediction = clip
    video = (torch.arange(FRAMES) / (FRAMES - 1) * 2 - 1)[None, :, None, None, None].expand(1, FRAMES, 3, HEIGHT, WIDTH)
    shown = scene(prediction, batch, video)
    np.testing.assert_allclose(shown.depth_true[1], [3, 3.1, 3.2, 3.3], rtol=1e-6)
    np.testing.assert_allclose(shown.depth_predicted[1], [6, 6.2, 6.4, 6.6], rtol=1e-6)
    assert shown.valid.tolist() == batch.valid[0, 2].tolist()
    assert set(shown.frame.flatten().tolist()) == {128}
    assert shown.points_true.shape == (HEIGHT * WIDTH - 1, 3)
    np.testing.assert_allclose(shown.points_predicted, 3 * shown.points_true, rtol=1e-6)
    np.testing.assert_allclose(shown.cameras_true.centres[:, 0], np.arange(FRAMES), atol=1e-6)
    np.testing.assert_allclose(shown.cameras_predicted.centres[:, 0], -np.arange(FRAMES), atol=1e-6)


def test_depth_of_unknown_scale_is_aligned(clip):
    batch, prediction = clip
    labels = torch.where(batch.valid, 7 * batch.depth - 2, 0)
    shown = scene(
        prediction, replace(batch, depth=labels, depth_kind=("affine_depth",)), torch.zeros(1, FRAMES, 3, 3, 4)
    )
    np.testing.assert_allclose(shown.depth_predicted[shown.valid], shown.depth_true[shown.valid], rtol=1e-4)
