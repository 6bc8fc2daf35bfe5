"""Reprojection of depth by cameras, by hand on two frames of 4 x 4 pixels with a vertical field of view of 90 degrees."""

import math

import pytest
import torch

from fw_train.evaluation.consistency import View, frame_pairs, reprojection, square_intrinsics_px, visible_pixels
from fw_train.geometry import invert_rigid, pixel_directions, rigid

F64 = torch.float64
RIGHT_ANGLE = torch.full((2,), math.pi / 2, dtype=F64)  # the focal length is 2 pixels


def ahead(*distances):
    """Cameras that moved along their axis."""
    centres = torch.tensor([[0.0, 0, distance] for distance in distances], dtype=F64)
    return rigid(torch.eye(3, dtype=F64).expand(len(distances), 3, 3), centres)


def walls(*depths):
    return torch.stack([torch.full((4, 4), depth, dtype=F64) for depth in depths])


def test_a_step_towards_a_wall_by_hand():
    """From 2 to 1.5 before a wall pixels move outwards by 4/3: of the centres at 0.5 and 1.5 pixels from the middle the
    outer ones leave the picture (1.5 * 4/3 = 2 > 1.5), four remain. Where 1.8 is predicted instead of 1.5, the error is
    |1.5 - 1.8| / 1.8."""
    true = View(walls(2.0, 1.5), ahead(0.0, 0.5), RIGHT_ANGLE)
    visible = visible_pixels(true, torch.ones(2, 4, 4, dtype=torch.bool))
    assert visible.nonzero().tolist() == [[0, row, column] for row in (1, 2) for column in (1, 2)]
    perfect = reprojection(true, visible)
    assert (perfect.error.item(), perfect.coverage.item()) == pytest.approx((0, 1))
    wrong = reprojection(true._replace(depth=walls(2.0, 1.8)), visible)
    assert wrong.error.item() == pytest.approx(0.3 / 1.8)
    assert wrong.coverage.item() == 1
    other_way = reprojection(true._replace(depth=walls(2.0, 1.2)), visible)
    assert other_way.error.item() == pytest.approx(0.3 / 1.5)


def test_depth_and_cameras_of_another_scale_agree_with_each_other():
    true = View(walls(2.0, 1.5), ahead(0.0, 0.5), RIGHT_ANGLE)
    visible = visible_pixels(true, torch.ones(2, 4, 4, dtype=torch.bool))
    larger = View(3 * true.depth, ahead(0.0, 1.5), RIGHT_ANGLE)
    assert reprojection(larger, visible).error.item() == pytest.approx(0)
    assert reprojection(true._replace(depth=3 * true.depth), visible).error.item() == pytest.approx(1 / 5.5)


def test_what_leaves_the_picture_is_not_asked_but_missing():
    """Predicted 0.4 before the wall, pixels move outwards by 2 / 0.4 = 5, all of them out.

    7 further on the wall is behind, where the pixels of a mirrored picture would be inside.
    """
    true = View(walls(2.0, 1.5), ahead(0.0, 0.5), RIGHT_ANGLE)
    visible = visible_pixels(true, torch.ones(2, 4, 4, dtype=torch.bool))
    for distance in (1.6, 2.5, 7.0):
        out = reprojection(true._replace(first_from_cam=ahead(0.0, distance)), visible)
        assert out.coverage.item() == 0
        assert math.isnan(out.error.item())


def test_only_what_both_frames_truly_see_is_asked():
    """Something stands before the wall in the second frame, and a pixel of the first has no label."""
    depth = walls(2.0, 2.0)
    depth[1, 1, 1] = 0.5
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[0, 2, 2] = False
    depth[0, 2, 2] = math.nan
    visible = visible_pixels(View(depth, ahead(0.0, 0.0), RIGHT_ANGLE), valid)
    assert (~visible).nonzero().tolist() == [[0, 1, 1], [0, 2, 2]]


def test_a_slanted_plane_is_consistent_from_any_side():
    """Depth of the plane n . x = 2 seen by cameras that turn, move and zoom; inverse depth is linear between pixels."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.tensor([0.3, -0.2, 0.9], dtype=F64)
    frames, height, width = 5, 12, 16
    fov = torch.linspace(0.9, 1.1, frames, dtype=F64)
    angles = 0.06 * torch.randn(frames, 3, generator=generator, dtype=F64)
    x, y, z = angles.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).unflatten(-1, (3, 3))
    poses = rigid(torch.matrix_exp(cross), 0.2 * torch.randn(frames, 3, generator=generator, dtype=F64))
    rays = pixel_directions(square_intrinsics_px(fov, height, width), height, width) @ poses[:, None, :3, :3].mT
    depth = (2 - poses[:, :3, 3] @ normal)[:, None, None] / (rays @ normal)
    view = View(depth, poses, fov)
    visible = visible_pixels(view, torch.ones_like(depth, dtype=torch.bool))
    assert visible.double().mean() > 0.5
    assert reprojection(view, visible).error.item() == pytest.approx(0, abs=1e-12)
    swapped = view._replace(first_from_cam=invert_rigid(poses))
    assert reprojection(swapped, visible).error.item() > 0.01


def test_frames_are_paired_a_quarter_of_the_clip_apart():
    assert frame_pairs(2) == [(0, 1)]
    assert frame_pairs(5) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert frame_pairs(81)[0] == (0, 20)
    assert frame_pairs(81)[-1] == (60, 80)
