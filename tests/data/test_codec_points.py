"""The camera fitted to a frame of points, and the step of the offsets from its rays."""

import numpy as np
import pytest

from data_tools.bench_codec import synthetic_clip
from fw_train.data.codec import decode_points, encode_points, read_header
from fw_train.data.codec_planes import CannotHold
from fw_train.data.codec_points import RayCamera, fit_camera, offset_step_px, ray_codes

HEIGHT, WIDTH, FOCAL_PX = 96, 128, 110.0
CENTRE = np.array([0.7, -0.2, 0.4])
CAMERA_TO_PIXELS = np.array([[FOCAL_PX, 0, 60.0], [0, 1.1 * FOCAL_PX, 50.0], [0, 0, 1]])


PRINCIPAL = np.array([[0, 0, 60.0], [0, 0, 50.0], [0, 0, 0]])


def turned(degrees):
    a = np.radians(degrees)
    return np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])


def seen(z, rotation, centre, zoom=1):
    """Points [3, H, W] that a camera with these axes and this centre sees at depth z [H, W]."""
    v, u = np.mgrid[: z.shape[0], : z.shape[1]].astype(np.float64)
    rays = np.linalg.inv(np.diag([zoom, zoom, 1]) @ (CAMERA_TO_PIXELS - PRINCIPAL) + PRINCIPAL) @ np.stack(
        (u, v, np.ones_like(u))
    ).reshape(3, -1)
    points = rotation @ (rays * z.reshape(-1)) + centre[:, None]
    return points.reshape(3, *z.shape).astype(np.float32)


@pytest.fixture
def relief():
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    return 4 + np.sin(u / 9) + 0.5 * np.cos(v / 7) + (u > 70)


everywhere = np.ones((HEIGHT, WIDTH), bool)


@pytest.mark.parametrize("flip", [(1, 1, 1), (1, -1, -1)])  # +z ahead, or +z behind as in OpenGL
def test_the_fit_finds_the_camera(relief, flip):
    rotation = np.diag(flip) @ turned(25)
    camera = fit_camera(seen(relief, rotation, CENTRE), everywhere)
    np.testing.assert_allclose(camera.centre, CENTRE, atol=2e-5)
    np.testing.assert_allclose(camera.rays, rotation @ np.linalg.inv(CAMERA_TO_PIXELS), atol=1e-6)


def test_one_round_is_enough_for_exact_points(relief, monkeypatch):
    rounds = []
    solve = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda a: rounds.append(1) or solve(a))
    fit_camera(seen(relief, turned(25), CENTRE), everywhere)
    fit_camera(seen(relief, turned(-25), -CENTRE), everywhere)
    assert len(rounds) == 2


def test_reweighting_discounts_a_block_of_wrong_points(relief):
    points = seen(relief, turned(10), CENTRE)
    points[:, :40, :30] += np.float32([[[0.5]], [[-0.3]], [[0.0]]])
    centre = fit_camera(points, everywhere).centre
    assert np.abs(centre - CENTRE).max() < 0.1  # 0.5 without reweighting


def test_exact_points_need_no_offsets(relief):
    coded = ray_codes(seen(relief, turned(25), CENTRE), everywhere, 1e-3, 7e-4)
    assert not coded.codes[1:].any()


def test_offset_codes_are_signed(relief):
    points = seen(relief, turned(0), np.zeros(3))
    away = 3 / FOCAL_PX * relief[8, 9]  # moves the pixel by three columns to the left
    points[0, 8, 9] -= away
    coded = ray_codes(points, everywhere, 1e-3, 7e-4)
    du, dv = coded.codes[1:, 8, 9].view(np.int16)
    assert du * coded.parameters[1] == pytest.approx(-3, abs=0.05)
    assert abs(dv * coded.parameters[1]) < 0.05


@pytest.mark.parametrize("fov_deg", [20, 60, 90, 120])
@pytest.mark.parametrize(("step", "bound"), [(1e-3, 7e-4), (2e-4, 1.4e-4)])
def test_the_offset_step_uses_the_bound_up_but_keeps_it(fov_deg, step, bound):
    focal_px = 64 / np.tan(np.radians(fov_deg) / 2)
    rays = np.array([[1 / focal_px, 0, -64 / focal_px], [0, 1 / focal_px, -64 / focal_px], [0, 0, 1]])
    camera = RayCamera(turned(30) @ rays, np.zeros(3, np.float32))
    half = offset_step_px(camera, step, bound) / 2
    v, u = np.mgrid[:129, :129].astype(np.float64)
    pixels = np.stack((u, v, np.ones_like(u))).reshape(3, -1)
    true, worst = camera.rays @ pixels, 0.0
    for du in (-half, half):
        for dv in (-half, half):
            for stretch in (np.exp(-step / 2), np.exp(step / 2)):
                off = stretch * (camera.rays @ (pixels + np.array([[du], [dv], [0]]))) - true
                worst = max(worst, (np.linalg.norm(off, axis=0) / np.linalg.norm(true, axis=0)).max())
    assert worst < bound
    if fov_deg >= 90:  # the worst angle, 36 degrees off the axis, is in view
        assert worst > 0.99 * bound


def test_step_of_a_known_camera():
    rays = np.linalg.inv(np.array([[500.0, 0, 296], [0, 500, 168], [0, 0, 1]]))
    assert offset_step_px(RayCamera(rays, np.zeros(3)), 1e-3, 7e-4) == pytest.approx(0.240814, abs=1e-6)


def test_a_single_plane_is_held_with_the_centre_at_the_origin():
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    wall = 5 / (1 + 0.002 * u - 0.001 * v)  # a tilted plane
    points = seen(wall, turned(15), CENTRE)
    with pytest.raises(CannotHold, match="more than one camera explains the frame"):
        fit_camera(points, everywhere)
    encoded = encode_points(np.moveaxis(points, 0, -1)[None].copy())
    assert not encoded.report.fell_back
    assert not read_header(encoded.data).table["parameters"][0, 11:].any()
    off = np.linalg.norm(decode_points(encoded.data)[0][0] - np.moveaxis(points, 0, -1), axis=-1)
    assert (off <= 7e-4 * np.linalg.norm(points, axis=0)).all()


def frames_without_a_camera():
    rng = np.random.default_rng(0)
    u = np.tile(np.arange(WIDTH, dtype=np.float64), (HEIGHT, 1))
    z = 4 + np.sin(u / 9)
    return {
        "one point": (np.ones((3, HEIGHT, WIDTH)), "more than one camera|in front"),  # whichever way a zero is rounded
        "a line": (np.stack((u, u, u)) + 1, "more than one camera"),
        "random": (rng.uniform(-1, 1, (3, HEIGHT, WIDTH)), "more than one camera|in front|behind"),
        "huge": (seen(z, turned(0), CENTRE) * 1e30, "leave the range"),
    }


@pytest.mark.parametrize("name", frames_without_a_camera())
def test_points_that_no_camera_saw_are_kept_lossless(name):
    planes, message = frames_without_a_camera()[name]
    points = np.moveaxis(planes, 0, -1)[None].astype(np.float32)
    encoded = encode_points(points)
    assert encoded.report.fell_back
    np.testing.assert_array_equal(decode_points(encoded.data)[0], points)
    with pytest.raises(CannotHold, match=message):
        ray_codes(planes.astype(np.float32), everywhere, 1e-3, 7e-4)


def test_parallel_rays_have_no_camera_but_a_bound():
    v, u = np.mgrid[:HEIGHT, :WIDTH].astype(np.float64)
    planes = np.stack((u / 50, v / 50, 4 + np.sin(u / 9))).astype(np.float32)
    with pytest.raises(CannotHold, match="the fitted camera is singular: its rays are parallel or lie in one plane"):
        fit_camera(planes, everywhere)
    points = np.moveaxis(planes, 0, -1)[None]
    off = np.linalg.norm(decode_points(encode_points(points).data)[0] - points, axis=-1)
    assert (off <= 7e-4 * np.linalg.norm(points, axis=-1)).all()


def test_a_far_centre_may_not_loosen_the_bound(relief):
    """Seen through a long lens, a small scene about the origin would be off by 7e-4 of the distance to that lens."""
    points = seen(relief + 296, turned(0), np.array([0, 0, -300.0]), zoom=100)
    far = r"the fitted camera is 30\d away from points that are 1\.\d+ from the origin"
    with pytest.raises(CannotHold, match=far):
        fit_camera(points, everywhere)


def test_few_valid_points_are_enough_wherever_they_lie(relief):
    points = seen(relief, turned(25), CENTRE)
    valid = np.zeros((HEIGHT, WIDTH), bool)
    valid[np.random.default_rng(0).integers(0, HEIGHT, 40), np.random.default_rng(1).integers(0, WIDTH, 40)] = True
    np.testing.assert_allclose(fit_camera(points, valid).centre, CENTRE, atol=1e-3)
    valid[:] = False
    valid[3, :7] = True
    with pytest.raises(CannotHold, match="7 valid points are too few"):
        fit_camera(points, valid)


def test_rounding_far_from_the_origin_is_noticed():
    """Points at 1e5 from the origin are themselves rounded by more than the bound allows to add."""
    points = synthetic_clip(1, HEIGHT, WIDTH).points + np.float32(1e5)
    encoded = encode_points(points)
    assert encoded.report.fell_back
    np.testing.assert_array_equal(decode_points(encoded.data)[0], points)
