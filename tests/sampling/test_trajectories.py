"""Generated camera paths against hand-computed cameras, and against renderings: what moves which way in the picture."""

import math

import numpy as np
import pytest
import torch
from picture_motion import picture_motion

from data_tools.scene_render import View, render_colour
from data_tools.scenes import sample_scene, surfaces_at, views
from fw_train.camera_files import CameraFileError, write_cameras
from fw_train.geometry import RE10K_SIZE, Cameras, decode_pose9, intrinsics_px, invert_rigid
from fw_train.sampling.trajectories import (
    camera_inputs,
    decoded_trajectory,
    generated_trajectory,
    read_trajectory,
    square_pixels,
)

SIZE = (64, 96)
FRACTIONS = square_pixels(torch.tensor(math.radians(45), dtype=torch.float64), SIZE)


def test_pixels_are_square_and_the_field_of_view_is_vertical():
    focal_px = SIZE[0] / 2 / math.tan(math.radians(22.5))
    expected = torch.tensor((focal_px, focal_px, SIZE[1] / 2, SIZE[0] / 2), dtype=torch.float64)
    torch.testing.assert_close(intrinsics_px(FRACTIONS, *SIZE), expected)


def end_of(motion, amount, focus=1.0):
    return generated_trajectory(motion, amount, 5, focus, FRACTIONS).first_from_cam[-1]


def test_positive_amounts_go_right_and_forward():
    angle = math.radians(30)
    pan, orbit, dolly = end_of("pan", angle), end_of("orbit", angle, focus=2.0), end_of("dolly", 0.7)
    expected = torch.tensor((math.sin(angle), 0, math.cos(angle)), dtype=torch.float64)
    torch.testing.assert_close(pan[:3, 2], expected)
    assert not pan[:3, 3].any()
    torch.testing.assert_close(dolly[:3, 3], torch.tensor((0, 0, 0.7), dtype=torch.float64))
    assert torch.equal(dolly[:3, :3], torch.eye(3, dtype=torch.float64))
    assert orbit[0, 3] == pytest.approx(2 * math.sin(angle))
    # Where an orbit looks, two scene scales ahead, is the same place as at the start.
    torch.testing.assert_close(orbit[:3, 3] + 2 * orbit[:3, 2], torch.tensor((0.0, 0, 2), dtype=torch.float64))


@pytest.mark.parametrize("motion", ["orbit", "dolly", "pan"])
def test_a_path_starts_at_the_first_camera_and_is_slow_at_both_ends(motion):
    poses = generated_trajectory(motion, 0.8, 9, 1.0, FRACTIONS).first_from_cam
    assert torch.equal(poses[0], torch.eye(4, dtype=torch.float64))
    rotation = poses[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand(9, 3, 3))
    steps = (poses[1:] - poses[:-1]).flatten(1).norm(dim=1)
    assert steps[0] < 0.4 * steps[4]
    assert steps[-1] < 0.4 * steps[4]


def rendered(motion, amount, seed):
    """A synthetic scene, 17 frames along a generated path from its own first camera; its scale is the stage's distance."""
    scene = sample_scene(0, seed, moving=0, sky=0)
    first = views(scene, 2, 16, *SIZE)[0]
    path = generated_trajectory(motion, amount, 17, 1.0, FRACTIONS).first_from_cam.numpy().copy()
    path[:, :3, 3] *= np.linalg.norm(first.stage_from_cam[:3, 3])
    return np.stack(
        [
            render_colour(
                surfaces_at(scene, 0, 0), scene.light, View(first.stage_from_cam @ pose, first.focal_px, *SIZE)
            )
            for pose in path
        ]
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_contents_move_against_the_camera_in_rendered_scenes(sign):
    """Measured here: pans 2.5 to 2.7, zooms 0.8 to 2.1, orbits 0.9 to 2.7 pixels a frame."""
    for seed in range(2):
        assert -sign * picture_motion(rendered("pan", sign * 0.4, seed)).right > 1.5
        assert sign * picture_motion(rendered("dolly", sign * 0.35, seed)).zoom > 0.5
        # What is near moves against the camera, what lies behind the centre with it.
        assert -sign * picture_motion(rendered("orbit", sign * 0.5, seed)).shear > 0.5


def test_a_camera_file_is_read_relative_to_its_first_camera_in_scene_scales(tmp_path):
    wanted = generated_trajectory("orbit", 0.6, 5, 1.5, FRACTIONS)
    world = torch.linalg.matrix_exp(torch.tensor([[0, -0.3, 0.2], [0.3, 0, -0.1], [-0.2, 0.1, 0]], dtype=torch.float64))
    world_from_first = torch.eye(4, dtype=torch.float64)
    world_from_first[:3, :3], world_from_first[:3, 3] = world, torch.tensor((3.0, -1, 2))
    poses = wanted.first_from_cam.clone()
    poses[:, :3, 3] *= 4.0  # metres
    write_cameras(tmp_path / "path.txt", Cameras(invert_rigid(world_from_first @ poses), wanted.intrinsics_frac))
    found = read_trajectory(tmp_path / "path.txt", 5, SIZE, 4.0, None, FRACTIONS)
    torch.testing.assert_close(found.first_from_cam, wanted.first_from_cam)
    torch.testing.assert_close(found.intrinsics_frac, wanted.intrinsics_frac)


def test_fractions_of_other_frames_are_cropped_to_the_clips_shape(tmp_path):
    """A square cut out of 16:9 frames has the same vertical field of view and a narrower horizontal one."""
    fractions = torch.tensor((0.5, 0.5 * 16 / 9, 0.5, 0.5), dtype=torch.float64)
    poses = torch.eye(4, dtype=torch.float64).expand(5, 4, 4)
    write_cameras(tmp_path / "path.txt", Cameras(poses, fractions.expand(5, 4)))
    found = read_trajectory(tmp_path / "path.txt", 5, (64, 64), 1.0, RE10K_SIZE, FRACTIONS).intrinsics_frac[0]
    torch.testing.assert_close(found, torch.tensor((0.5 * 16 / 9, 0.5 * 16 / 9, 0.5, 0.5), dtype=torch.float64))


def test_rows_without_intrinsics_take_the_field_of_view_asked_for(tmp_path):
    (tmp_path / "path.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * 5)
    assert torch.equal(
        read_trajectory(tmp_path / "path.txt", 5, SIZE, 1.0, None, FRACTIONS).intrinsics_frac, FRACTIONS.expand(5, 4)
    )
    with pytest.raises(CameraFileError, match="5 rows for 9 frames"):
        read_trajectory(tmp_path / "path.txt", 9, SIZE, 1.0, None, FRACTIONS)


def test_all_inputs_of_a_network_say_the_same():
    path = generated_trajectory("orbit", 0.6, 5, 1.5, FRACTIONS)
    inputs = camera_inputs(path, SIZE)
    poses, fov_y = decode_pose9(inputs.pose9[0].double())
    torch.testing.assert_close(poses, path.first_from_cam, atol=1e-6, rtol=0)
    assert fov_y[0].item() == pytest.approx(math.radians(45))
    back = decoded_trajectory(inputs.pose9[0], SIZE)
    torch.testing.assert_close(back.intrinsics_frac, path.intrinsics_frac, atol=1e-6, rtol=0)
    # The middle of the last frame of the last group looks along the last camera's axis; its moment is centre x axis.
    maps = inputs.control_camera[0]
    assert maps.shape == (24, 2, *SIZE)
    middle = maps.unflatten(0, (6, 4))[:, 3, 1, 31:33, 47:49].mean(dim=(1, 2))
    centre, axis = path.first_from_cam[-1, :3, 3], path.first_from_cam[-1, :3, 2]
    torch.testing.assert_close(middle[3:].double(), axis, atol=1e-3, rtol=0)
    torch.testing.assert_close(middle[:3].double(), torch.linalg.cross(centre, axis), atol=1e-3, rtol=0)
