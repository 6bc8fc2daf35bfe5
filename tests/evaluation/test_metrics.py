"""All metrics of a clip together: perfect, transformed, spoilt; and what labels do not say."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fw_train.batch import Batch, Prediction
from fw_train.evaluation.consistency import square_intrinsics_px
from fw_train.evaluation.metrics import DIFFUSION, GEOMETRY, clip_metrics
from fw_train.geometry import decode_pose9, encode_pose9, pixel_directions, rigid, unproject

FRAMES, HEIGHT, WIDTH = 5, 16, 24
BETTER = {metric.name: metric.better for metric in GEOMETRY}


@pytest.fixture(scope="module")
def clip():
    """A camera that goes round a slanted plane with a hole in its labels."""
    angle = torch.linspace(0, 0.2, FRAMES, dtype=torch.float64)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rotation = torch.stack(
        (angle.cos(), zero, angle.sin(), zero, one, zero, -angle.sin(), zero, angle.cos()), dim=-1
    ).unflatten(-1, (3, 3))
    poses = rigid(rotation, torch.stack((-1.2 * angle.sin(), 0.1 * angle, 1.2 - 1.2 * angle.cos()), dim=-1))
    fov = torch.full((FRAMES,), 0.9, dtype=torch.float64)
    intrinsics = square_intrinsics_px(fov, HEIGHT, WIDTH)
    normal = torch.tensor([0.2, -0.3, 1.0], dtype=torch.float64)
    rays = pixel_directions(intrinsics, HEIGHT, WIDTH) @ poses[:, None, :3, :3].mT
    depth = (1.2 - poses[:, :3, 3] @ normal)[:, None, None] / (rays @ normal)
    valid = torch.ones(1, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    valid[:, :, 3:5, 6:9] = False
    return Batch(
        latents=torch.zeros(1, 16, 2, HEIGHT // 8, WIDTH // 8), text=torch.zeros(1, 1, 4), position=torch.tensor([3]),
        depth=torch.where(valid, depth.float()[None], 0), valid=valid,
        points=torch.where(valid[:, :, None], unproject(depth, intrinsics, poses).float()[None], 0),
        pose9=encode_pose9(poses, fov).float()[None], keys=("plane",),
    )  # fmt: skip


def said(batch):
    """The prediction that repeats the labels, and garbage where there are none."""
    depth = torch.where(batch.valid, batch.depth, 7.0)
    points = torch.where(batch.valid[:, :, None], batch.points, -9.0)
    return Prediction(None, depth, points, torch.ones_like(depth), batch.pose9)


def test_a_perfect_prediction_scores_perfectly_in_everything(clip):
    scores = clip_metrics(said(clip), clip)
    assert set(scores) == {metric.name for metric in GEOMETRY}
    for name, value in scores.items():
        best = 1 if BETTER[name] == "higher" else 0
        # A hole in the predicted depth is seen by its neighbours, which interpolate.
        slack = 2e-2 if name.startswith("consistency/reprojection") else 1e-4
        assert value == pytest.approx(best, abs=slack), name


def test_the_truth_without_holes_is_consistent_to_the_last_digits(clip):
    whole = replace(clip, depth=torch.where(clip.valid, clip.depth, clip.depth.amax()), valid=clip.valid)
    inside = clip.valid.clone()
    inside[:, :, 1:7, 3:12] = False  # nothing next to the hole is asked
    scores = clip_metrics(said(clip), replace(whole, valid=inside))
    assert scores["consistency/reprojection"] == pytest.approx(0, abs=1e-5)


def test_a_known_rigid_transform_and_scale_leave_no_aligned_error(clip):
    poses, fov = decode_pose9(clip.pose9[0].double())
    turn = torch.matrix_exp(torch.tensor([[0, -0.3, 0.1], [0.3, 0, -0.2], [-0.1, 0.2, 0]], dtype=torch.float64))
    move = rigid(turn, torch.tensor([0.5, -1, 2], dtype=torch.float64))
    moved = move @ poses
    moved[:, :3, 3] *= 2.5
    points = 2.5 * (torch.einsum("ij,btjhw->btihw", turn.float(), clip.points) + move[:3, 3].float()[:, None, None])
    prediction = Prediction(
        None, 2.5 * clip.depth + 0.3, points, torch.ones_like(clip.depth), encode_pose9(moved, fov).float()[None]
    )
    scores = clip_metrics(prediction, clip)
    assert min(scores["depth/absrel"], scores["points/chamfer"], scores["points/pixel"]) > 0.5
    for name in ("depth/absrel_aligned", "depth/rmse_aligned", "points/accuracy_aligned", "points/completeness_aligned",
                 "points/chamfer_aligned", "points/pixel_aligned", "cameras/ate", "cameras/rotation_deg",
                 "cameras/translation_deg"):  # fmt: skip
        assert scores[name] == pytest.approx(0, abs=2e-3 if "deg" in name else 1e-4), name
    for name in ("depth/delta1_aligned", "cameras/auc30", "cameras/auc30_signed"):
        assert scores[name] == 1, name


def test_worse_predictions_score_worse(clip):
    noise = torch.Generator().manual_seed(0)
    perfect = said(clip)
    wrong = Prediction(
        None,
        perfect.depth * (1 + 0.5 * torch.rand(perfect.depth.shape, generator=noise)),
        perfect.points + 0.3 * torch.randn(perfect.points.shape, generator=noise),
        perfect.confidence,
        perfect.cameras + 0.1 * torch.randn(perfect.cameras.shape, generator=noise),
    )
    good, bad = clip_metrics(perfect, clip), clip_metrics(wrong, clip)
    for name, value in bad.items():
        assert value < good[name] if BETTER[name] == "higher" else value > good[name], name


def test_labels_of_unknown_scale_say_nothing_about_ratios(clip):
    scores = clip_metrics(said(clip), replace(clip, depth=4 * clip.depth - 1, depth_kind=("affine_depth",)))
    assert scores["depth/rmse_aligned"] == pytest.approx(0, abs=1e-5)
    assert [name for name in scores if name.startswith("depth/")] == ["depth/rmse_aligned"]
    assert not [name for name in scores if name.startswith("consistency/")]
    disparity = replace(clip, depth=torch.where(clip.valid, 3 / clip.depth + 2, 0), depth_kind=("affine_disparity",))
    assert clip_metrics(said(clip), disparity)["depth/rmse_aligned"] == pytest.approx(0, abs=1e-5)


def test_a_clip_without_labels_leaves_the_cameras(clip):
    scores = clip_metrics(said(clip), replace(clip, valid=torch.zeros_like(clip.valid)))
    assert {name.split("/")[0] for name in scores} == {"cameras", "loss"}
    assert [name for name in scores if name.startswith("loss/")] == ["loss/camera"]


def test_a_single_frame_has_no_pairs(clip):
    one = replace(
        clip, depth=clip.depth[:, :1], points=clip.points[:, :1], valid=clip.valid[:, :1], pose9=clip.pose9[:, :1]
    )
    assert {name.split("/")[0] for name in clip_metrics(said(one), one)} == {"depth", "points", "loss"}
    assert "depth/flicker" not in clip_metrics(said(one), one)


def test_what_is_not_finite_scores_nan(clip):
    perfect = said(clip)
    broken = Prediction(None, *(value * math.nan for value in perfect[1:]))
    scores = clip_metrics(broken, clip)
    assert all(math.isnan(scores[name]) for name in ("depth/absrel", "points/chamfer_aligned", "cameras/ate"))


def test_names_are_unique_and_the_documentation_has_them_all():
    names = [metric.name for metric in (*GEOMETRY, *DIFFUSION)]
    assert len(set(names)) == len(names)
    documented = set(
        re.findall(r"`([a-z]+/[\w-]+)`", (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text())
    )
    assert documented <= set(names)
    assert set(names) - documented == {f"diffusion/t{n:03}0-{n + 10:03}0" for n in range(10, 90, 10)}
