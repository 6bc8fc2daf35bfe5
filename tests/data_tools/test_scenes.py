import math

import numpy as np
import pytest

from data_tools.paths import PATH_KINDS, describe_path, sample_path, stage_from_cam
from data_tools.scene_files import camera_track, points_in_first
from data_tools.scene_render import render_labels
from data_tools.scene_shapes import Box, Sphere, local_points
from data_tools.scenes import STAGE_RADIUS_M, caption, sample_scene, surfaces_at, views

FRAMES, FPS, SIZE = 9, 8, (32, 48)
SCENES = range(60)
# Mean and least depth of the first four scenes half-way.
GOLDEN_DEPTH = [
    (7.222230995909372, 2.700199938739806),
    (6.247856401526637, 1.8353699506197796),
    (6.607565487026396, 2.524558441649559),
    (10.067435580937273, 2.771156895579366),
]


def moving_things(rest):
    found = []
    for index in SCENES:
        scene = sample_scene(3, index, moving=1.0, sky=0.3)
        found += [(scene, number, thing) for number, thing in enumerate(scene.objects) if thing.motion.rest == rest]
    assert len(found) >= 5
    return found


def paths(kind):
    found = [path for path in (sample_path(np.random.default_rng(seed)) for seed in range(200)) if path.kind == kind]
    assert len(found) > 20
    return found


def test_a_scene_depends_on_seed_and_number_alone():
    assert sample_scene(1, 5, 0.5, 0.5) == sample_scene(1, 5, 0.5, 0.5)
    assert sample_scene(1, 5, 0.5, 0.5) != sample_scene(1, 6, 0.5, 0.5)
    assert sample_scene(1, 5, 0.5, 0.5) != sample_scene(2, 5, 0.5, 0.5)


@pytest.mark.parametrize(("fraction", "least", "most"), [(0.0, 0, 0), (1.0, 60, 60), (0.5, 18, 42)])
def test_fractions_of_scenes_move_and_have_an_open_sky(fraction, least, most):
    scenes = [sample_scene(0, index, fraction, fraction) for index in SCENES]
    assert least <= sum(any(thing.motion.rest != "still" for thing in scene.objects) for scene in scenes) <= most
    assert least <= sum(any(not surface.depth for surface in scene.surroundings) for scene in scenes) <= most


def test_things_stand_apart_on_the_stage_whenever_one_looks():
    for index in SCENES:
        scene = sample_scene(0, index, 1.0, 0.0)
        for progress in (0.0, 0.5, 1.0):
            shapes = [surface.shape for surface in surfaces_at(scene, progress, progress)][: len(scene.objects)]
            discs = [
                (np.array(s.centre)[[0, 2]], s.radius if isinstance(s, Sphere) else math.hypot(s.half[0], s.half[2]))
                for s in shapes
            ]
            for shape in shapes:
                lowest = shape.centre[1] + (shape.radius if isinstance(shape, Sphere) else shape.half[1])
                assert lowest <= 1e-9
            for i, (a, radius) in enumerate(discs):
                assert np.hypot(*a) + radius <= STAGE_RADIUS_M + 1e-9
                assert all(np.hypot(*(a - b)) > radius + other for b, other in discs[:i])


def test_labels_stay_on_the_surface_of_what_moves():
    checked = 0
    for rest in ("slides", "bounces", "turns"):
        for scene, number, _ in moving_things(rest)[:3]:
            clip = views(scene, FRAMES, FPS, *SIZE)
            track = camera_track(clip).numpy()
            first = clip[0].stage_from_cam
            for frame, view in enumerate(clip):
                surfaces = surfaces_at(scene, frame / (FRAMES - 1), frame / FPS)
                labels = render_labels(surfaces, view)
                points = points_in_first(labels.depth_m, view, track[frame])[labels.surface == number]
                inner = local_points(surfaces[number].shape, (first[:3, :3] @ points.T.astype(float)) + first[:3, 3:])
                match surfaces[number].shape:
                    case Sphere(radius=radius):
                        np.testing.assert_allclose(np.linalg.norm(inner, axis=0), radius, atol=1e-5)
                    case Box(half=half):
                        outside = np.abs(inner) / np.array(half)[:, None]
                        np.testing.assert_allclose(outside.max(axis=0), 1, atol=1e-4)
                checked += len(points)
    assert checked > 1000


def test_slides_go_where_the_caption_says_for_the_first_camera():
    signs = {
        "to the right": (0, 1),
        "to the left": (0, -1),
        "away from the camera": (2, 1),
        "towards the camera": (2, -1),
    }
    for scene, number, thing in moving_things("slides"):
        world = views(scene, FRAMES, FPS, *SIZE)[0].stage_from_cam[:3, :3]
        start, end = (np.array(surfaces_at(scene, u, u)[number].shape.centre) for u in (0.0, 1.0))
        axis, sign = signs[thing.motion.phrase.removeprefix("slides ")]
        assert sign * ((end - start) @ world)[axis] > 0.4
        middle = np.array(surfaces_at(scene, 0.5, 0.5)[number].shape.centre)
        np.testing.assert_allclose(middle, (start + end) / 2, atol=1e-12)


def test_what_bounces_falls_freely_and_comes_back():
    for scene, number, thing in moving_things("bounces"):
        height = thing.motion.height_m
        period = 2 * math.sqrt(2 * height / 9.81)

        def rise(seconds, scene=scene, number=number, thing=thing):
            return thing.shape.centre[1] - surfaces_at(scene, 0.0, seconds)[number].shape.centre[1]

        assert rise(0) == 0
        assert rise(period / 2) == pytest.approx(height)
        assert rise(period / 4) == pytest.approx(0.75 * height)
        assert rise(2.3 * period) == pytest.approx(rise(0.3 * period))


def test_turning_boxes_turn_evenly_in_time():
    for scene, number, thing in moving_things("turns"):
        angles = [surfaces_at(scene, 0.0, seconds)[number].shape.yaw_rad for seconds in (0.0, 1.0, 2.0)]
        assert angles[1] - angles[0] == pytest.approx(angles[2] - angles[1])
        assert abs(angles[1] - angles[0]) == pytest.approx(abs(thing.motion.turn_rad_s))


@pytest.mark.parametrize("kind", PATH_KINDS)
def test_cameras_are_rigid_and_stay_off_the_stage(kind):
    for path in paths(kind):
        poses = stage_from_cam(path, FRAMES, FPS)
        rotation = poses[:, :3, :3]
        np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.eye(3) + np.zeros((FRAMES, 3, 3)), atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(rotation), 1)
        assert np.hypot(poses[:, 0, 3], poses[:, 2, 3]).min() > STAGE_RADIUS_M + 1
        assert poses[:, 1, 3].max() < -0.4


@pytest.mark.parametrize(
    ("kind", "axis", "phrases"),
    [
        ("orbit", 0, ("orbits anticlockwise", "orbits clockwise")),
        ("dolly", 2, ("moves forward", "moves back")),
        ("crane", 1, ("sinks", "rises")),
    ],
)
def test_cameras_move_where_the_caption_says(kind, axis, phrases):
    for path in paths(kind):
        poses = stage_from_cam(path, FRAMES, FPS)
        moved = np.linalg.inv(poses[0]) @ poses[-1]
        assert describe_path(path) == f"the camera {phrases[0] if moved[axis, 3] > 0 else phrases[1]}"
        assert abs(moved[axis, 3]) > 0.5


def test_a_pan_turns_in_place_to_the_side_that_the_caption_says():
    for path in paths("pan"):
        poses = stage_from_cam(path, FRAMES, FPS)
        moved = np.linalg.inv(poses[0]) @ poses[-1]
        np.testing.assert_allclose(moved[:3, 3], 0, atol=1e-12)
        assert describe_path(path) == f"the camera pans to the {'right' if moved[0, 2] > 0 else 'left'}"


def test_a_hand_shakes_smoothly():
    for path in paths("handheld"):
        centres = stage_from_cam(path, 33, 16)[:, :3, 3]
        assert 0.01 < np.abs(centres - centres.mean(axis=0)).max() < 0.5
        assert np.linalg.norm(np.diff(centres, axis=0), axis=1).max() < 0.1


def test_captions_name_what_can_be_seen_and_only_that():
    for index in range(12):
        scene = sample_scene(5, index, 0.5, 0.2)
        text = caption(scene, FRAMES, FPS, *SIZE)
        assert text == caption(scene, FRAMES, FPS, *SIZE)
        assert text[0].isupper()
        assert f" {scene.place}, " in text
        assert text.endswith(f", {describe_path(scene.path)}.")
        seen = set()
        for frame, view in enumerate(views(scene, FRAMES, FPS, *SIZE)):
            surfaces = surfaces_at(scene, frame / (FRAMES - 1), frame / FPS)
            seen |= set(render_labels(surfaces, view).surface.ravel().tolist())
        for number, thing in enumerate(scene.objects):
            if thing.name in text.lower():
                assert number in seen
            if thing.motion.rest != "still" and thing.name in text.lower():
                assert f"the {thing.name} {thing.motion.phrase}" in text


def test_paths_are_of_the_kinds_that_are_asked_for():
    kinds = {sample_scene(0, index, 0, 0, ("pan", "orbit")).path.kind for index in range(20)}
    assert kinds == {"pan", "orbit"}
    assert {sample_scene(0, index, 0, 0).path.kind for index in range(40)} == set(PATH_KINDS)


def test_a_caption_may_leave_out_what_the_camera_does():
    for index in range(3):
        scene = sample_scene(0, index, 1.0, 0.0)
        full, silent = caption(scene, FRAMES, FPS, *SIZE), caption(scene, FRAMES, FPS, *SIZE, camera=False)
        assert full == f"{silent[:-1]}, {describe_path(scene.path)}."


def test_a_caption_reads_as_written():
    assert caption(sample_scene(0, 2, 1.0, 0.0), 17, 16, 64, 96) == (
        "A turquoise checkered box, a blue striped box and a red spotted sphere on a checkered floor in a room with brick walls, "
        "the turquoise checkered box slides to the right, the camera rises."
    )


def test_the_series_stays_what_it_is():
    """Golden numbers: the same seed gives the same scenes in every version."""
    found = []
    for index in range(4):
        scene = sample_scene(0, index, 0.5, 0.2)
        depth = render_labels(surfaces_at(scene, 0.5, 0.25), views(scene, 3, 4, *SIZE)[1]).depth_m
        found.append((np.nanmean(depth), np.nanmin(depth)))
    np.testing.assert_allclose(found, GOLDEN_DEPTH, rtol=1e-6)
