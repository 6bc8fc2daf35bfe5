import numpy as np
import pytest

from data_tools.scene_shapes import Box, Level, Sphere, local_points, meet, normal

SPHERE = Sphere((1.0, 0.0, 5.0), 2.0)


def hit(shape, origin, direction):
    rays = np.array(direction, float)[:, None]
    return float(meet(shape, np.array(origin, float)[:, None], rays)[0])


@pytest.mark.parametrize(
    ("shape", "origin", "direction", "expected"),
    [
        (SPHERE, (1, 0, 0), (0, 0, 1), 3),
        (SPHERE, (1, 0, 0), (0, 0, 2), 1.5),
        (SPHERE, (1, 1, 0), (0, 0, 1), 5 - np.sqrt(3)),
        (SPHERE, (1, 2.1, 0), (0, 0, 1), np.inf),
        (SPHERE, (1, 0, 9), (0, 0, 1), np.inf),
        (SPHERE._replace(inside=True), (1, 0, 5), (0, 1, 0), 2),
        (SPHERE._replace(inside=True), (1, 0, 4), (0, 0, 1), 3),
        (Level(), (0, -1.5, 0), (0, 0.5, 1), 3),
        (Level(), (0, -1.5, 0), (0, -0.5, 1), np.inf),
        (Level(), (0, -1.5, 0), (1, 0, 1), np.inf),
        (Level(-4.0, 1.0), (0, -1.5, 0), (0, -0.5, 1), 5),
        (Box((0, 0, 6), (1, 2, 3)), (0, 0, 0), (0, 0, 1), 3),
        (Box((0, 0, 6), (1, 2, 3)), (-4, 0, 6), (2, 0, 0), 1.5),
        (Box((0, 0, 6), (1, 2, 3)), (0, 2.1, 0), (0, 0, 1), np.inf),
        (Box((0, 0, 6), (1, 2, 3)), (0, 0, 10), (0, 0, 1), np.inf),
        # Turned by 90 degrees the long side lies along x; by 45 a cube shows its edge.
        (Box((0, 0, 6), (1, 2, 3), np.pi / 2), (0, 0, 0), (0, 0, 1), 5),
        (Box((0, 0, 6), (1, 1, 1), np.pi / 4), (0, 0, 0), (0, 0, 1), 6 - np.sqrt(2)),
        (Box((0, 0, 0), (1, 2, 3), 0, True), (0, 0, 1), (0, 0, 1), 2),
        (Box((0, 0, 0), (1, 2, 3), 0, True), (0, 1, 0), (0, -1, 0), 3),
    ],
)
def test_rays_meet_shapes_where_geometry_says(shape, origin, direction, expected):
    assert hit(shape, origin, direction) == pytest.approx(expected, rel=1e-12)


def test_a_positive_turn_takes_z_towards_x():
    # The far corner direction of a long box points along +x +z, so the ray that passes there is met and its mirror image is not.
    box = Box((0, 0, 0), (0.2, 1, 3), np.pi / 4)
    assert np.isfinite(hit(box, (1.5, -5, 1.5), (0, 1, 0)))
    assert np.isinf(hit(box, (-1.5, -5, 1.5), (0, 1, 0)))


@pytest.mark.parametrize(
    ("shape", "point", "expected"),
    [
        (SPHERE, (1, 0, 3), (0, 0, -1)),
        (SPHERE._replace(inside=True), (1, 0, 3), (0, 0, 1)),
        (Level(), (3, 0, 2), (0, -1, 0)),
        (Level(-4, 1.0), (3, -4, 2), (0, 1, 0)),
        (Box((0, 0, 6), (1, 2, 3)), (0.5, 2, 7), (0, 1, 0)),
        (Box((0, 0, 6), (1, 2, 3), 0, True), (0.5, 2, 7), (0, -1, 0)),
        (Box((0, 0, 6), (1, 2, 3), np.pi / 2), (3, 0.5, 6.2), (1, 0, 0)),
    ],
)
def test_normals_face_the_viewer(shape, point, expected):
    np.testing.assert_allclose(normal(shape, np.array(point, float)[:, None])[:, 0], expected, atol=1e-12)


def test_textures_stay_on_what_moves_and_turns():
    box = Box((2, -1, 3), (1, 1, 1), 0.0)
    turned = box._replace(centre=(5, -1, 0), yaw_rad=np.pi / 2)
    # The middle of the +z face before, and of the same face after, which now looks along +x.
    before = local_points(box, np.array((2.0, -1, 4))[:, None])
    after = local_points(turned, np.array((6.0, -1, 0))[:, None])
    np.testing.assert_allclose(before, after, atol=1e-12)
