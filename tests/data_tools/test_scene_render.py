import numpy as np
import pytest

from data_tools.scene_render import Light, Surface, View, camera_directions, render_colour, render_labels
from data_tools.scene_shapes import Level, Sphere
from data_tools.scene_textures import PATTERNS, Texture, albedo

WHITE = Texture("plain", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DOME = Surface(Sphere((0, 0, 0), 50.0, True), Texture("sky", (0.5, 0.6, 0.8), (0.1, 0.2, 0.6)), False, False, False)
FLOOR = Surface(Level(), WHITE, casts=False)
LIGHT = Light((0.0, -100.0, 0.0), 0.8, (0.2, 0.2, 0.2), (0.5, 0.5, 0.5), 1e6, (0.0, 0.0, 0.0))


def facing_floor(height=32, width=48, up=4.0):
    """A camera `up` metres above the floor that looks straight down."""
    pose = np.eye(4)
    pose[:3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])
    pose[1, 3] = -up
    return View(pose, 40.0, height, width)


def test_depth_is_along_the_axis_and_not_along_the_ray():
    labels = render_labels([FLOOR, DOME], facing_floor())
    np.testing.assert_allclose(labels.depth_m, 4.0, rtol=1e-12)
    assert (labels.surface == 0).all()


def test_pixel_centres_lie_at_a_half():
    directions = camera_directions(View(np.eye(4), 40.0, 32, 48))
    np.testing.assert_allclose(directions[:, 0, 0], ((0.5 - 24) / 40, (0.5 - 16) / 40, 1))
    np.testing.assert_allclose(directions[:, 31, 47], ((47.5 - 24) / 40, (31.5 - 16) / 40, 1))
    fine = camera_directions(View(np.eye(4), 40.0, 32, 48), samples=2)
    np.testing.assert_allclose(fine[:, :2, :2].mean(axis=(1, 2)), directions[:, 0, 0])


def test_the_nearer_surface_hides_the_other_and_the_sky_has_no_depth():
    view = View(np.eye(4), 40.0, 32, 48)
    ball = Surface(Sphere((0.0, 0.0, 5.0), 1.0), WHITE)
    labels = render_labels([ball, Surface(Level(1.0), WHITE, False), DOME], view)
    x, y, _ = camera_directions(view)[:, 15, 23]
    a, b = x * x + y * y + 1, 5
    assert labels.depth_m[15, 23] == pytest.approx((b - np.sqrt(b * b - a * 24)) / a, rel=1e-12)
    assert labels.surface[15, 23] == 0
    assert labels.depth_m[31, 0] == pytest.approx(1 / camera_directions(view)[1, 31, 0])
    assert np.isnan(labels.depth_m[0]).all()


def test_an_open_scene_is_refused():
    with pytest.raises(ValueError, match="a room or a dome around it"):
        render_labels([FLOOR], View(np.eye(4), 40.0, 32, 48))


def test_a_ball_throws_its_shadow_away_from_the_light():
    ball = Surface(Sphere((0.0, -1.0, 0.0), 0.5), WHITE)
    light = LIGHT._replace(position=(-100.0, -100.0, 0.0))
    picture = render_colour([ball, FLOOR, DOME], light, facing_floor(64, 96)).astype(int)
    # From 4 m above, the shadow of the ball at height 1 lies around x = +1, ten pixels right of the middle.
    shadow, lit = picture[32, 48 + 12].mean(), picture[32, 48 - 12].mean()
    assert shadow < 0.7 * lit


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_give_colours_and_fade_far_away(pattern):
    points = np.random.default_rng(0).uniform(-3, 3, (3, 500))
    points[1] = -np.abs(points[1])
    texture = Texture(pattern, (0.8, 0.1, 0.1), (0.1, 0.1, 0.8), 0.5)
    near, far = (albedo(texture, points, np.full(500, footprint)) for footprint in (1e-3, 10.0))
    assert near.shape == (3, 500)
    assert near.min() >= 0
    assert near.max() <= 1
    assert near.std(axis=1).max() > 0.01
    if pattern not in ("sky", "panels"):
        np.testing.assert_allclose(far, far[:, :1].repeat(500, axis=1))


def test_the_air_is_warm_towards_the_glow_and_cool_away_from_it():
    view = View(np.eye(4), 40.0, 32, 48)
    plain, evening = (
        render_colour([DOME], LIGHT._replace(glow=glow), view).astype(int) for glow in ((0.0,) * 3, (0.6, 0.0, 0.0))
    )
    red, green, blue = np.moveaxis(evening - plain, -1, 0).mean(axis=1)  # of each column
    assert (np.diff(red[::8]) > 0).all()
    assert (np.diff(blue[::8]) < 0).all()
    assert red[0] < -10 < 10 < red[-1]
    assert blue[-1] < -10 < 10 < blue[0]
    assert np.abs(green).max() == 0
