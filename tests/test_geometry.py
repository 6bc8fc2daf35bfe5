"""Cameras and poses, against hand-made numbers, reference arrays and round trips."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_train.geometry import (
    RE10K_SIZE,
    Cameras,
    absolute_trajectory_error,
    align_similarity,
    auc_deg,
    crop_resize_intrinsics,
    decode_pose9,
    direction_angle_deg,
    divide_translation,
    encode_pose9,
    intrinsics_px,
    invert_rigid,
    mirror_cameras,
    mirror_points,
    pack_plucker,
    plucker_rays,
    points_in_first_camera,
    relative_pose_errors,
    relative_to_first,
    rigid,
    rotation_angle_deg,
    scene_scale,
    transform_points,
    unproject,
    vertical_fov_rad,
    wrap_angle,
)

FIXTURE = np.load(Path(__file__).parent / "fixtures/cameras_re10k.npz")
F64 = torch.float64


def fixture_cameras():
    rows = torch.from_numpy(FIXTURE["rows"])
    matrix = rows[:, 7:].unflatten(1, (3, 4))
    return Cameras(rigid(matrix[..., :3], matrix[..., 3]), rows[:, 1:5])


def rotation(axis, angle):
    """Right-handed rotation about a coordinate axis."""
    c, s = math.cos(angle), math.sin(angle)
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    r = torch.eye(3, dtype=F64)
    r[i, i] = r[j, j] = c
    r[i, j], r[j, i] = -s, s
    return r


def random_cameras(seed, count=1, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=F64)).Q
    q = q * torch.linalg.det(q).sign()[:, None, None]
    return rigid(q, torch.randn(count, 3, generator=generator, dtype=F64)).to(dtype)


class TestReference:
    def test_relative_poses(self):
        relative = relative_to_first(fixture_cameras().cam_from_world)
        np.testing.assert_allclose(relative.numpy(), FIXTURE["relative_c2w"], atol=1e-4)

    @pytest.mark.parametrize(
        ("name", "original"), [("plucker_original_pose_1280x720", RE10K_SIZE), ("plucker_direct_intrinsics", None)]
    )
    def test_dense_plucker_in_both_intrinsics_conventions(self, name, original):
        cameras, height, width = fixture_cameras(), int(FIXTURE["height"]), int(FIXTURE["width"])
        intrinsics = intrinsics_px(cameras.intrinsics_frac, height, width, original)
        rays = plucker_rays(relative_to_first(cameras.cam_from_world), intrinsics, height, width)
        np.testing.assert_allclose(rays.numpy(), FIXTURE[name], atol=1e-4)


class TestIntrinsics:
    def test_a_portrait_crop_of_a_wide_original_sees_less_of_the_width(self):
        frac = torch.tensor([0.5, 0.5 * 16 / 9, 0.5, 0.5], dtype=F64)
        fx, fy, cx, cy = intrinsics_px(frac, height=592, width=336, original_size=RE10K_SIZE).tolist()
        assert fx == pytest.approx(0.5 * 592 * 16 / 9)  # the original scaled to the frame's height
        assert fy == pytest.approx(0.5 * 16 / 9 * 592)
        assert (cx, cy) == (168, 296)

    def test_a_wider_crop_scales_the_other_axis(self):
        fx, fy, *_ = intrinsics_px(torch.tensor([0.5, 0.9, 0.5, 0.5]), 100, 200, RE10K_SIZE).tolist()
        assert fx == pytest.approx(100)
        assert fy == pytest.approx(0.9 * 200 * 9 / 16)

    def test_the_field_of_view(self):
        assert vertical_fov_rad(torch.tensor([1.0, 0.5, 0.5, 0.5]), 1.0).item() == pytest.approx(math.pi / 2)

    def test_a_crop_sees_the_same_rays(self):
        frac, pose = torch.tensor([0.8, 1.1, 0.45, 0.55], dtype=F64), torch.eye(4, dtype=F64)
        whole = plucker_rays(pose, intrinsics_px(frac, 40, 60), 40, 60)
        cropped = crop_resize_intrinsics(frac, (40, 60), (4, 10, 20, 30))
        part = plucker_rays(pose, intrinsics_px(cropped, 20, 30), 20, 30)
        torch.testing.assert_close(part, whole[4:24, 10:40])

    def test_mirrored_cameras_see_mirrored_points(self):
        cameras = Cameras(random_cameras(1), torch.tensor([[0.8, 1.1, 0.4, 0.55]], dtype=F64))
        depth = 1 + torch.rand(1, 6, 8, dtype=F64)

        def points(cameras, depth):
            return unproject(depth, intrinsics_px(cameras.intrinsics_frac, 6, 8), invert_rigid(cameras.cam_from_world))

        mirrored = points(mirror_cameras(cameras), depth.flip(-1))
        expected = points(cameras, depth).flip(-1) * torch.tensor([-1.0, 1, 1], dtype=F64)[:, None, None]
        torch.testing.assert_close(mirrored, expected)
        assert torch.equal(mirror_points(points(cameras, depth)), expected)

    @pytest.mark.parametrize("crop", [(21, 0, 20, 60), (0, 40, 40, 21), (-1, 0, 20, 60), (0, 0, 0, 60)])
    def test_a_crop_lies_within_its_frame(self, crop):
        with pytest.raises(ValueError, match=r"does not lie within the 40x60 frame"):
            crop_resize_intrinsics(torch.ones(4), (40, 60), crop)


class TestPlucker:
    def test_one_ray_by_hand(self):
        pose = rigid(torch.eye(3, dtype=F64), torch.tensor([1.0, 2, 3], dtype=F64))
        ray = plucker_rays(pose[None], torch.tensor([[2.0, 2, 1, 1]], dtype=F64), 2, 2)[0, 0, 1]
        d = torch.tensor([0.25, -0.25, 1], dtype=F64)  # pixel centre (1.5, 0.5)
        d = d / d.norm()
        torch.testing.assert_close(ray, torch.cat((torch.linalg.cross(torch.tensor([1.0, 2, 3], dtype=F64), d), d)))

    def test_packing_by_hand(self):
        """Channel c * 4 + k is component c of frame k of the group; the first group is frame 0 four times."""
        rays = (10 * torch.arange(5.0).view(5, 1, 1, 1) + torch.arange(6.0)).expand(5, 2, 3, 6)
        packed = pack_plucker(rays)
        assert packed.shape == (24, 2, 2, 3)
        for c in range(6):
            assert packed[4 * c : 4 * c + 4, 0, 0, 0].tolist() == [c] * 4
            assert packed[4 * c : 4 * c + 4, 1, 0, 0].tolist() == [10 + c, 20 + c, 30 + c, 40 + c]

    def test_a_batch_is_packed_clip_by_clip(self):
        rays = torch.randn(2, 9, 2, 3, 6, generator=torch.Generator().manual_seed(0))
        assert torch.equal(pack_plucker(rays), torch.stack([pack_plucker(clip) for clip in rays]))

    def test_a_clip_of_another_length_cannot_be_packed(self):
        with pytest.raises(ValueError, match=r"8 ray maps are not 4k \+ 1; cut the clip to 5"):
            pack_plucker(torch.zeros(8, 2, 2, 6))


class TestPose9:
    def test_the_first_camera(self):
        assert encode_pose9(torch.eye(4), torch.tensor(1.0)).tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1]

    def test_a_known_pose(self):
        """Turned 90 degrees to the right (about y, down), standing at (1, 2, 3)."""
        pose = rigid(rotation("y", math.pi / 2), torch.tensor([1.0, 2, 3], dtype=F64))
        expected = [
            1,
            0,
            0,
            *torch.linalg.cross(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 0, 0])).tolist(),
            1,
            0,
            0.8,
        ]
        encoded = encode_pose9(pose, torch.tensor(0.8, dtype=F64))
        torch.testing.assert_close(encoded, torch.tensor(expected, dtype=F64), atol=1e-12, rtol=0)

    def test_the_numbers_are_no_slice_of_the_matrix(self):
        """A public implementation takes the last numbers of the row-major 3x4 for the translation."""
        pose = random_cameras(3)[0]
        numbers = encode_pose9(pose, torch.tensor(1.0, dtype=F64))
        centre = torch.linalg.cross(numbers[:3], numbers[3:6]) + numbers[6] * numbers[:3]
        torch.testing.assert_close(centre, pose[:3, 3])
        assert not torch.allclose(pose[:3].flatten()[-3:], pose[:3, 3])

    def test_roll_is_the_angle_about_the_axis(self):
        for angle in (0.3, -2.0, 3.1):
            pose = rigid(rotation("z", angle), torch.zeros(3, dtype=F64))
            assert encode_pose9(pose, torch.tensor(1.0, dtype=F64))[7].item() == pytest.approx(angle)

    def test_a_half_turn_rolls_by_plus_pi(self):
        for sign in (1, -1):
            pose = torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=F64))
            pose[1, 0] = sign * 0.0
            assert encode_pose9(pose, torch.tensor(1.0, dtype=F64))[7].item() == math.pi

    @given(seed=st.integers(0, 10**6))
    @settings(max_examples=60, deadline=None)
    def test_round_trip_of_random_cameras(self, seed):
        poses, fov = random_cameras(seed, 8), torch.linspace(0.3, 2, 8, dtype=F64)
        decoded, again = decode_pose9(encode_pose9(poses, fov))
        torch.testing.assert_close(decoded, poses, atol=1e-9, rtol=0)
        assert torch.equal(again, fov)

    @pytest.mark.parametrize("axis", ["x", "y", "z"])
    def test_round_trip_of_a_full_orbit(self, axis):
        """About x the camera looks straight up and down on its way, where the roll changes its reference."""
        angles = torch.linspace(0, 2 * math.pi, 361).tolist()
        poses = torch.stack(
            [rigid(r := rotation(axis, a), r @ torch.tensor([0.2, 0.1, -2.0], dtype=F64)) for a in angles]
        )
        decoded, _ = decode_pose9(encode_pose9(poses, torch.ones(361, dtype=F64)))
        torch.testing.assert_close(decoded, poses, atol=1e-7, rtol=0)

    def test_round_trip_in_fp32(self):
        poses = random_cameras(5, 100, torch.float32)
        decoded, _ = decode_pose9(encode_pose9(poses, torch.ones(100)))
        torch.testing.assert_close(decoded, poses, atol=2e-5, rtol=0)

    @pytest.mark.parametrize("up", [1, -1])
    def test_encoding_and_decoding_agree_when_an_axis_is_vertical(self, up):
        """fp32 rounding puts axes around the threshold on either side of it: a different reference would be another roll."""
        generator = torch.Generator().manual_seed(0)
        sines = 1 - 1e-6 + 3e-7 * torch.randn(2000, generator=generator, dtype=F64)
        poses = []
        for sine in sines.clamp(max=1).tolist():
            turn, roll = (2 * math.pi * torch.rand(2, generator=generator)).tolist()
            r = rotation("y", turn) @ rotation("x", -up * math.asin(sine)) @ rotation("z", roll)
            poses.append(rigid(r, torch.ones(3, dtype=F64)))
        poses = torch.stack(poses).float()
        decoded, _ = decode_pose9(encode_pose9(poses, torch.ones(len(poses))))
        torch.testing.assert_close(decoded, poses, atol=2e-5, rtol=0)

    @pytest.mark.parametrize("down", [1, -1])
    @pytest.mark.parametrize("roll", [0.0, 1.2, math.pi])
    def test_a_vertical_axis_rolls_from_the_first_cameras_x_axis(self, down, roll):
        """For d = (0, down, 0): x0 = (1, 0, 0) and y0 = d x x0 = (0, 0, -down)."""
        x = torch.tensor([math.cos(roll), 0, -down * math.sin(roll)], dtype=F64)
        axis = torch.tensor([0.0, down, 0], dtype=F64)
        pose = rigid(torch.stack((x, torch.linalg.cross(axis, x), axis), dim=-1), torch.ones(3, dtype=F64))
        numbers = encode_pose9(pose, torch.tensor(1.0, dtype=F64))
        assert numbers[7].item() == pytest.approx(roll)
        torch.testing.assert_close(decode_pose9(numbers)[0], pose)

    def test_what_a_moment_has_along_the_axis_and_the_length_of_the_axis_do_not_count(self):
        numbers = encode_pose9(random_cameras(9, 5), torch.ones(5, dtype=F64))
        changed = numbers.clone()
        changed[:, 3:6] += 0.7 * numbers[:, :3]
        changed[:, :3] *= 3
        torch.testing.assert_close(decode_pose9(changed)[0], decode_pose9(numbers)[0])

    def test_any_numbers_decode_to_a_camera(self):
        poses, _ = decode_pose9(torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=F64))
        r = poses[:, :3, :3]
        torch.testing.assert_close(r @ r.transpose(1, 2), torch.eye(3, dtype=F64).expand(50, 3, 3), atol=1e-9, rtol=0)
        torch.testing.assert_close(torch.linalg.det(r), torch.ones(50, dtype=F64))

    @pytest.mark.parametrize("pose", [torch.eye(4), rigid(rotation("x", math.pi / 2).float(), torch.zeros(3))])
    def test_gradients_are_finite_where_the_roll_degenerates(self, pose):
        pose = pose.clone().requires_grad_()
        decoded, _ = decode_pose9(encode_pose9(pose, torch.tensor(1.0)))
        decoded.square().sum().backward()
        assert pose.grad.isfinite().all()

    def test_angles_wrap_into_the_half_open_circle(self):
        wrapped = wrap_angle(torch.tensor([0.0, math.pi, -math.pi, 3 * math.pi, 1 + 4 * math.pi, -4.0], dtype=F64))
        expected = torch.tensor([0, math.pi, math.pi, math.pi, 1, 2 * math.pi - 4], dtype=F64)
        torch.testing.assert_close(wrapped, expected)

    def test_small_angles_are_not_rounded_by_wrapping(self):
        angles = torch.tensor([1e-8, -1e-8, 1e-6, 0.1, -3.0, math.pi])
        assert torch.equal(wrap_angle(angles), angles)


class TestPoints:
    def test_unprojection_by_hand(self):
        depth = torch.full((2, 2), 4.0)
        points = unproject(depth, torch.tensor([2.0, 2, 1, 1]), torch.eye(4))
        assert points[:, 0, 0].tolist() == [-1, -1, 4]  # pixel centre (0.5, 0.5): (0.5 - 1) / 2 * 4
        assert points[:, 1, 1].tolist() == [1, 1, 4]

    def test_points_of_all_cameras_meet_in_the_first_cameras_frame(self):
        """A plane at z = 5 of the first camera, seen from elsewhere."""
        cameras = random_cameras(2, 1)
        small = rigid(rotation("y", 0.2), torch.tensor([0.3, -0.1, 0.2], dtype=F64))
        first_from_cam = relative_to_first(torch.stack((cameras[0], invert_rigid(small) @ cameras[0])))
        intrinsics = torch.tensor([20.0, 20, 8, 8], dtype=F64)
        rays = plucker_rays(first_from_cam[1:], intrinsics[None], 16, 16)[0, ..., 3:]
        origin = first_from_cam[1, :3, 3]
        hit = origin + rays * ((5 - origin[2]) / rays[..., 2:])
        cam_from_first = invert_rigid(first_from_cam[1])
        depth = transform_points(cam_from_first, hit.permute(2, 0, 1))[2]
        points = unproject(depth, intrinsics, first_from_cam[1])
        torch.testing.assert_close(points[2], torch.full((16, 16), 5.0, dtype=F64))

    def test_world_points_move_into_the_first_cameras_frame(self):
        cam_from_world, intrinsics = random_cameras(11, 6).unflatten(0, (2, 3)), torch.tensor([5.0, 6, 3, 2], dtype=F64)
        depth = 1 + torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
        in_world = unproject(depth, intrinsics, invert_rigid(cam_from_world))
        expected = unproject(depth, intrinsics, relative_to_first(cam_from_world))
        torch.testing.assert_close(points_in_first_camera(in_world, cam_from_world), expected)

    def test_each_clip_of_a_batch_has_its_own_scale(self):
        points = torch.ones(2, 1, 3, 1, 1) * torch.tensor([3.0, 6]).view(2, 1, 1, 1, 1)
        scale = scene_scale(points, torch.ones(2, 1, 1, 1, dtype=torch.bool))
        torch.testing.assert_close(scale, torch.tensor([27.0, 108]).sqrt())
        poses = divide_translation(random_cameras(1, 4).float().unflatten(0, (2, 2)), scale)
        torch.testing.assert_close(poses[1, :, :3, 3], random_cameras(1, 4).float()[2:, :3, 3] / scale[1])
        assert torch.equal(poses[..., :3, :3].flatten(0, 1), random_cameras(1, 4).float()[:, :3, :3])

    @pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
    def test_a_scale_that_nothing_can_be_divided_by_is_an_error(self, value):
        with pytest.raises(ValueError, match=r"over \[4\] valid points cannot be divided by"):
            scene_scale(torch.full((1, 1, 3, 2, 2), value), torch.ones(1, 1, 2, 2, dtype=torch.bool))

    def test_the_scene_scale_is_the_mean_distance_of_valid_points(self):
        points = torch.zeros(1, 3, 1, 3)
        points[0, :, 0] = torch.tensor([[3.0, 0, torch.nan], [4, 0, 0], [0, 1, 0]])
        assert scene_scale(points, torch.tensor([[[True, True, False]]])).item() == 3
        with pytest.raises(ValueError, match="no valid point"):
            scene_scale(points, torch.zeros(1, 1, 3, dtype=torch.bool))


class TestMetrics:
    @pytest.mark.parametrize("angle_deg", [0, 1e-4, 30, 179.9, 180])
    def test_rotation_angle(self, angle_deg):
        turned = rotation("x", math.radians(angle_deg))
        assert rotation_angle_deg(turned, torch.eye(3, dtype=F64)).item() == pytest.approx(angle_deg, abs=1e-6)

    def test_rotation_angle_in_fp32_near_a_half_turn(self):
        turned = rotation("x", math.radians(179.9)).float()
        assert rotation_angle_deg(turned, torch.eye(3)).item() == pytest.approx(179.9, abs=1e-4)

    def test_rounding_is_no_movement(self):
        """A camera at rest, in fp32: directions of 1e-7 would be random angles."""
        jitter = 1e-7 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        at_rest = torch.eye(4).expand(4, 4, 4)
        errors = relative_pose_errors(rigid(torch.eye(3).expand(4, 3, 3), jitter), at_rest)
        assert errors.translation_deg.tolist() == [0] * 6

    def test_one_frame_has_no_relative_pose(self):
        with pytest.raises(ValueError, match="1 frames make no pair"):
            relative_pose_errors(torch.eye(4)[None], torch.eye(4)[None])

    def test_batches_are_measured_clip_by_clip(self):
        predicted, true = (random_cameras(seed, 12).unflatten(0, (2, 6)) for seed in (21, 22))
        errors = relative_pose_errors(predicted, true)
        trajectory, auc = absolute_trajectory_error(predicted, true), auc_deg(errors, threshold=180)
        for clip in range(2):
            alone = relative_pose_errors(predicted[clip], true[clip])
            torch.testing.assert_close(errors.rotation_deg[clip], alone.rotation_deg)
            torch.testing.assert_close(errors.translation_deg[clip], alone.translation_deg)
            torch.testing.assert_close(auc[clip], auc_deg(alone, threshold=180))
            torch.testing.assert_close(trajectory[clip], absolute_trajectory_error(predicted[clip], true[clip]))
        assert trajectory[0] != trajectory[1]

    def test_a_prediction_at_rest_aligns_to_the_mean(self):
        true = random_cameras(5, 6)
        spread = true[:, :3, 3] - true[:, :3, 3].mean(0)
        expected = spread.square().sum(-1).mean().sqrt().item()
        assert absolute_trajectory_error(torch.eye(4, dtype=F64).expand(6, 4, 4), true).item() == pytest.approx(
            expected
        )

    def test_direction_angle(self):
        a = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
        b = torch.tensor([[0.0, 2, 0], [-3, 0, 0], [0, 0, 0], [1, 0, 0]])
        torch.testing.assert_close(direction_angle_deg(a, b), torch.tensor([90.0, 180, 0, 90]))

    def test_a_known_similarity_leaves_no_error(self):
        true = random_cameras(7, 12)
        move = random_cameras(8)[0]
        centres = 2.5 * true[:, :3, 3] @ move[:3, :3].T + move[:3, 3]
        predicted = rigid(move[:3, :3] @ true[:, :3, :3], centres)
        assert absolute_trajectory_error(predicted, true).item() == pytest.approx(0, abs=1e-9)
        errors = relative_pose_errors(predicted, true)
        assert errors.rotation_deg.shape == (66,)
        assert max(errors.rotation_deg.max(), errors.translation_deg.max()) < 1e-5
        assert auc_deg(errors).item() == 1

    def test_the_alignment_is_the_inverse_of_the_move(self):
        points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        move = random_cameras(4)[0]
        scale, turned, shift = align_similarity(points, 0.5 * points @ move[:3, :3].T + move[:3, 3])
        assert scale.item() == pytest.approx(0.5)
        torch.testing.assert_close(turned, move[:3, :3])
        torch.testing.assert_close(shift, move[:3, 3])

    def test_a_mirrored_path_is_not_aligned_by_a_reflection(self):
        points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        mirrored = points * torch.tensor([-1.0, 1, 1], dtype=F64)
        scale, turned, shift = align_similarity(points, mirrored)
        assert torch.linalg.det(turned).item() == pytest.approx(1)

        def error(scale, turned):  # at the best translation
            centred, goal = points - points.mean(0), mirrored - mirrored.mean(0)
            return (scale * centred @ turned.T - goal).square().sum().item()

        found = error(scale, turned)
        assert (scale * points @ turned.T + shift - mirrored).square().sum().item() == pytest.approx(found)
        assert found > 1
        assert all(
            found <= error(s * scale, turned @ rotation(a, d))
            for s in (0.98, 1.02)
            for a in "xyz"
            for d in (-0.02, 0, 0.02)
        )

    def test_errors_by_hand(self):
        """Two frames: the second is turned by 10 degrees too much and moves to the side instead of ahead."""
        true = torch.stack(
            (torch.eye(4, dtype=F64), rigid(torch.eye(3, dtype=F64), torch.tensor([0.0, 0, 1], dtype=F64)))
        )
        wrong = rigid(rotation("y", math.radians(10)), torch.tensor([1.0, 0, 0], dtype=F64))
        errors = relative_pose_errors(torch.stack((torch.eye(4, dtype=F64), wrong)), true)
        assert errors.rotation_deg.tolist() == pytest.approx([10])
        assert errors.translation_deg.tolist() == pytest.approx([90])
        assert auc_deg(errors).item() == 0
        assert auc_deg(errors._replace(translation_deg=errors.rotation_deg + 0.5)).item() == pytest.approx(20 / 30)

    def test_the_trajectory_error_by_hand(self):
        """A square whose one corner is lifted: what no similarity removes is known in closed form for opposite lifts."""
        corners = torch.tensor([[1.0, 1, 0], [1, -1, 0], [-1, -1, 0], [-1, 1, 0]], dtype=F64)
        bent = corners + torch.tensor([[0, 0, 0.1], [0, 0, -0.1], [0, 0, 0.1], [0, 0, -0.1]], dtype=F64)
        eye = torch.eye(3, dtype=F64).expand(4, 3, 3)
        scale = 8 / (8 + 0.04)  # least squares: <bent, corners> / <bent, bent>
        expected = math.sqrt((8 * (scale - 1) ** 2 + 0.04 * scale**2) / 4)
        assert absolute_trajectory_error(rigid(eye, bent), rigid(eye, corners)).item() == pytest.approx(expected)
