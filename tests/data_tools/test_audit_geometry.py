import pytest
import torch
from raw_clips import clip_labels

from data_tools.audit_checks import check_geometry, check_motion, grid_labels, spans
from data_tools.audit_geometry import NEGLIGIBLE, diagnose, match, robust_fit
from data_tools.paths import CameraPath, stage_from_cam
from fw_train.geometry import Cameras, invert_rigid, relative_to_first, transform_points

TOLERANCE = 0.1


def make_labels(kind="orbit", amount=0.8, frames=5, noise=0.0, depth_kind="metric"):
    """A bumpy wall in front of each camera of a path, 30 x 40 pixels."""
    still = ((0.5, 0.5, 0.5),) * 6
    path = CameraPath(kind, amount, 0.3, 4.5, 1.5, (0.0, -0.4, 0.0), still, still)
    pose = invert_rigid(torch.from_numpy(stage_from_cam(path, frames, 16)))
    _, _, cameras = clip_labels(frames, 30, 40)
    x, y = torch.meshgrid(torch.arange(40) * 0.3, torch.arange(30) * 0.2, indexing="xy")
    depth = (4 + torch.sin(x) + torch.cos(y) + 0.1 * torch.arange(frames)[:, None, None]).double()
    fx, fy, cx, cy = cameras.intrinsics_frac[0].tolist()
    u, v = ((torch.arange(40) + 0.5) / 40 - cx) / fx, ((torch.arange(30) + 0.5) / 30 - cy) / fy
    rays = torch.stack((u.expand(30, 40), v[:, None].expand(30, 40), torch.ones(30, 40)))
    points = transform_points(relative_to_first(pose), rays * depth[:, None]).movedim(1, -1)
    random = torch.Generator().manual_seed(1)
    depth = depth * (1 + noise * torch.randn(depth.shape, generator=random, dtype=torch.float64))
    valid = torch.ones(depth.shape, dtype=torch.bool)
    return grid_labels(
        depth.numpy(), points.numpy(), valid.numpy(), Cameras(pose, cameras.intrinsics_frac), range(frames), depth_kind
    )


def inverted(labels):
    return labels._replace(cam_from_world=invert_rigid(labels.cam_from_world))


def faults(diagnosis):
    return [change.fault for change in diagnosis.changes]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_noise_is_no_fault_and_hides_no_fault(noise):
    clean = diagnose(make_labels(noise=noise), TOLERANCE)
    assert faults(clean) == []
    assert clean.given.error == pytest.approx(0.67 * noise, rel=0.3, abs=1e-6)
    assert faults(diagnose(inverted(make_labels(noise=noise)), TOLERANCE)) == ["pose-inverted"]


def test_what_noise_covers_is_not_guessed_at():
    labels = inverted(make_labels(amount=0.02, noise=0.05))
    diagnosis = diagnose(labels, TOLERANCE)
    assert diagnosis.given.error > NEGLIGIBLE
    assert faults(diagnosis) == []


def test_a_camera_that_stands_still_has_no_wrong_poses():
    for labels in (make_labels(amount=0.0), inverted(make_labels(amount=0.0))):
        assert diagnose(labels, TOLERANCE).given.error < NEGLIGIBLE


def test_a_clip_that_cannot_tell_mistakes_apart_says_so():
    labels = make_labels("pan", 0.5)
    first = relative_to_first(labels.cam_from_world)
    diagnosis = diagnose(labels._replace(cam_from_world=first), TOLERANCE)  # poses c2w, and no translation
    assert faults(diagnosis) == ["pose-inverted"]
    (found,) = check_geometry(diagnosis, range(5), TOLERANCE)
    assert "looks the same where the rotations are transposed" in found.detail


def test_two_mistakes_are_both_named():
    labels = inverted(make_labels())
    size = labels.intrinsics_frac.new_tensor((40, 30, 40, 30))
    diagnosis = diagnose(labels._replace(intrinsics_frac=labels.intrinsics_frac * size), TOLERANCE)
    assert faults(diagnosis) == ["pose-inverted", "wrong-intrinsics"]
    assert diagnosis.repaired.error < NEGLIGIBLE


def test_affine_depth_is_fitted_before_it_is_compared():
    labels = make_labels()
    disparity = labels._replace(depth=3 / labels.depth + 0.2, kind="affine_disparity")
    depth = labels._replace(depth=0.1 * labels.depth + 7, kind="affine_depth")
    for changed in (disparity, depth):
        assert match(changed).error < NEGLIGIBLE
        assert match(changed._replace(kind="metric")).error > 0.1
        assert faults(diagnose(inverted(changed), TOLERANCE)) == ["pose-inverted"]
    falling = labels._replace(depth=9 - labels.depth, kind="affine_depth")
    assert match(falling).error == float("inf")


def test_errors_are_those_of_the_worst_frame():
    labels = make_labels()
    points = labels.points.clone()
    points[3] *= 1.5
    found = match(labels._replace(points=points))
    assert found.error == found.frame_errors[3] > 0.3
    assert max(found.frame_errors[:3]) < NEGLIGIBLE


def test_invalid_pixels_say_nothing():
    labels = make_labels()
    valid = labels.valid.clone()
    valid[:, ::2] = False
    depth = torch.where(valid, labels.depth, torch.nan)
    assert match(labels._replace(depth=depth, valid=valid)).error < NEGLIGIBLE
    nothing = labels._replace(valid=torch.zeros_like(valid))
    assert match(nothing).error == 0


def test_a_robust_fit_leaves_outliers_aside():
    rows = torch.stack((torch.linspace(1, 2, 100), torch.ones(100)), dim=1).double()
    wanted = rows @ torch.tensor([3.0, -1]).double()
    wanted[::4] += 50
    assert torch.allclose(
        robust_fit(rows, wanted), torch.tensor([3.0, -1]).double(), atol=0.05
    )  # least squares are 12 off


def test_slow_cameras_and_noise_freeze_nothing():
    motion = torch.linspace(0.1, 9, 20).double().numpy()
    still = motion < 0
    assert check_motion(0.5 * motion, motion, still) == []
    assert check_motion(0 * motion, 0 * motion + 0.5, still) == []  # less than a pixel
    assert check_motion(0 * motion + 2, 0 * motion, ~still) == []  # grain, before labels that rightly stay
    (found,) = check_motion(0 * motion + 9, 0 * motion, ~still)
    assert found.fault == "frozen-labels"
    assert check_motion(motion[:0], motion[:0], still[:0]) == []


def test_spans():
    assert spans([3]) == "3"
    assert spans([1, 2, 4, 5, 6, 9]) == "1, 2, 4 to 6, 9"
    assert spans(range(0, 60, 2)).endswith("14, ...")
