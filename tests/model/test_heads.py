from dataclasses import replace

import pytest
import torch

from fw_train.model.heads import DenseHead, DenseHeadParams, depth_from_raw, image_position, points_from_raw

PARAMS = DenseHeadParams(32, features=16, channels=(16, 16, 24, 24), chunk_frames=2)
GRID = (3, 3, 5)


def taps(batch=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 45, 32, generator=generator, requires_grad=True) for _ in range(4)]


def head(params=PARAMS, outputs=4):
    torch.manual_seed(0)
    return DenseHead(params, outputs)


def test_maps_come_at_full_resolution_for_every_latent_frame():
    assert head()(taps(2), GRID).shape == (2, 3, 4, 48, 80)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_the_chunk_size_changes_nothing(chunk):
    reference = head()(taps(2), GRID)
    chunked = head(replace(PARAMS, chunk_frames=chunk))(taps(2), GRID)
    torch.testing.assert_close(chunked, reference, atol=1e-6, rtol=1e-5)


def test_no_more_frames_than_the_chunk_are_computed_at_once():
    module = head()
    sizes = []
    module.frame_maps.neck.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    module(taps(3), GRID)
    assert sizes == [2, 2, 2, 2, 1]


def test_the_deepest_tap_is_the_finest():
    """It alone changes the picture from one pixel to the next; the shallowest reaches it through the coarsest level."""
    module = head().frame_maps
    assert [type(r).__name__ for r in module.resizes] == ["ConvTranspose2d", "ConvTranspose2d", "Identity", "Conv2d"]
    assert module.resizes[0].stride == (4, 4)
    assert module.resizes[3].stride == (2, 2)


def test_every_tap_and_every_weight_has_a_gradient():
    module, features = head(), taps()
    module(features, GRID).square().mean().backward()
    assert all(t.grad.abs().sum() > 0 for t in features)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_depth_is_positive_and_points_have_a_confidence_of_at_least_one():
    raw = 3 * torch.randn(1, 2, 1, 4, 4)
    assert depth_from_raw(raw).min() > 0
    assert depth_from_raw(raw).shape == (1, 5, 4, 4)
    points, confidence = points_from_raw(3 * torch.randn(1, 2, 4, 4, 4))
    assert points.shape == (1, 5, 3, 4, 4)
    assert confidence.shape == (1, 5, 4, 4)
    assert confidence.min() >= 1


def test_points_reach_both_signs_symmetrically():
    raw = torch.tensor([-2.0, 0.0, 2.0, 0.0]).view(1, 1, 4, 1, 1)
    points, _ = points_from_raw(raw)
    torch.testing.assert_close(points.flatten(), torch.tensor([-6.3890561, 0.0, 6.3890561]))


def test_the_image_position_tells_all_places_apart():
    code = image_position(21, 37, torch.empty(1, 64)).flatten(0, 1)
    distances = torch.cdist(code, code) + 10 * torch.eye(len(code))
    assert distances.min() > 0.05
