import numpy as np
import pytest

from fw_train.pictures.camera_path import COLOURED, PALE, CameraPath
from fw_train.pictures.colours import INVALID, depth_scale, heat_colours
from fw_train.pictures.drawing import FAINT, MARGIN, NARROW, SMALL, WHITE
from fw_train.pictures.scene import (
    BARS_PX,
    CLOUD_POINTS,
    WORST_ERROR,
    Scene,
    bars_picture,
    camera_sheet,
    cloud,
    depth_sheet,
)

HEIGHT, WIDTH, FRAMES = 64, 320, 9
TITLE, GAP = SMALL * 11, MARGIN // 2

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def scene(height=HEIGHT, width=WIDTH, **changes):
    """Depth that rises to the right from 1 to 3, with a hole at the upper left; cameras that move right and look ahead."""
    depth = np.broadcast_to(np.linspace(1, 3, width), (height, width)).copy()
    valid = np.ones((height, width), bool)
    valid[:16, :16] = False
    centres = np.zeros((FRAMES, 3))
    centres[:, 0] = np.linspace(0, 1, FRAMES)
    path = CameraPath(centres, np.tile((0.0, 0, 1), (FRAMES, 1)))
    rows, columns = np.indices((8, 8)).reshape(2, -1)
    points = np.stack((columns - 3.5, rows - 3.5, np.full(64, 4.0)), axis=-1)
    known = {
        "frame": np.full((height, width, 3), (200, 30, 90), np.uint8),
        "depth_true": depth,
        "depth_predicted": depth.copy(),
        "valid": valid,
        "points_true": points,
        "points_predicted": points.copy(),
        "point_colours": np.stack((rows, columns, rows), axis=-1).astype(np.uint8),
        "cameras_true": path,
        "cameras_predicted": path,
    }
    return Scene(**{**known, **changes})


def panels(sheet, height=HEIGHT, width=WIDTH):
    """Frame, error, true and predicted depth out of a sheet of two rows."""
    row = TITLE + height + GAP + 30 + MARGIN
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    cut = [
        sheet[MARGIN + TITLE + r * row :, MARGIN + c * (width + MARGIN) :][:height, :width].astype(int)
        for r, c in places
    ]
    return dict(zip(("frame", "error", "true", "predicted"), cut, strict=True))


def grey(picture):
    return np.isin(picture[..., 0], [level for level, *_ in INVALID]) & (picture == picture[..., :1]).all(axis=-1)


def count(picture, colour):
    return int((picture == np.array(colour)).all(axis=-1).sum())


def test_the_sheet_shows_the_frame_and_both_depths_in_the_scale_of_the_true_one():
    right = scene()
    found = panels(depth_sheet(right))
    np.testing.assert_array_equal(found["frame"], right.frame)
    np.testing.assert_array_equal(found["true"][right.valid], found["predicted"][right.valid])
    # A prediction that is twice as far has the colour that the truth has at twice the distance.
    far = panels(depth_sheet(right._replace(depth_predicted=2 * right.depth_true)))
    np.testing.assert_array_equal(far["true"], found["true"])
    scale = depth_scale(right.depth_true.astype(np.float32), right.valid)
    at_two, at_four = 40, int(np.abs(right.depth_true[0] - 2 * right.depth_true[0, 40]).argmin())
    inverse = 1 / right.depth_true[0, at_four]
    want = heat_colours(np.array((inverse - scale.far) / (scale.near - scale.far)))
    assert np.abs(far["predicted"][50, at_two] - want).max() <= 3
    assert np.abs(far["predicted"][50, at_two] - far["true"][50, at_two]).max() > 30


def test_pixels_without_a_label_or_a_prediction_are_grey_checks_and_no_others_are():
    right = scene()
    predicted = right.depth_true.copy()
    predicted[40:48, 100:120] = np.nan
    predicted[48:56, 100:120] = -1
    unknown = np.zeros_like(right.valid)
    unknown[40:56, 100:120] = True
    found = panels(depth_sheet(right._replace(depth_predicted=predicted)))
    np.testing.assert_array_equal(grey(found["true"]), ~right.valid)
    np.testing.assert_array_equal(grey(found["predicted"]), unknown)
    np.testing.assert_array_equal(grey(found["error"]), unknown | ~right.valid)


def test_the_error_map_is_the_relative_error_from_none_to_the_worst():
    right = scene()
    predicted = right.depth_true * np.where(np.arange(WIDTH) < 100, 1, np.where(np.arange(WIDTH) < 200, 1.25, 3))
    found = panels(depth_sheet(right._replace(depth_predicted=predicted)))["error"]
    for column, share in ((50, 0), (150, 0.25 / WORST_ERROR), (250, 1)):
        assert np.abs(found[30, column] - heat_colours(np.array(share, float))).max() <= 1


def test_a_portrait_is_one_row_and_nothing_valid_is_drawn_too():
    tall = scene(height=400, width=160)
    sheet = depth_sheet(tall)
    assert sheet.shape == (2 * MARGIN + TITLE + 800 + GAP + 30, 2 * MARGIN + 4 * NARROW + 3 * MARGIN, 3)
    empty = tall._replace(valid=np.zeros_like(tall.valid), depth_predicted=np.full_like(tall.depth_true, np.nan))
    assert depth_sheet(empty).shape == sheet.shape


def test_the_predicted_path_is_drawn_over_the_true_one():
    right = scene()
    centres = right.cameras_true.centres + np.linspace(0, 1, FRAMES)[:, None] * (0, 0, 1)
    wrong = camera_sheet(right._replace(cameras_predicted=CameraPath(centres, right.cameras_true.forward)))
    same = camera_sheet(right)
    assert not np.array_equal(wrong, same)
    assert count(wrong, COLOURED.last) > 20
    assert count(wrong, PALE.last) > 20
    apart = camera_sheet(right._replace(cameras_predicted=CameraPath(centres + 1, right.cameras_true.forward)))
    assert count(apart, WHITE) == pytest.approx(count(same, WHITE), abs=30)  # one ring
    assert count(same, PALE.last) < 5 < count(same, COLOURED.last)  # the same paths lie on top of each other


def test_height_plays_no_part_and_turning_does():
    right = scene()
    up = right.cameras_true.centres + np.array((0, -3, 0))
    turned = np.tile((1.0, 0, 0), (FRAMES, 1))
    assert np.array_equal(
        camera_sheet(right)[:480],
        camera_sheet(right._replace(cameras_predicted=CameraPath(up, right.cameras_true.forward)))[:480],
    )
    looking = right._replace(cameras_predicted=CameraPath(right.cameras_true.centres, turned))
    assert not np.array_equal(camera_sheet(right)[:480], camera_sheet(looking)[:480])


def test_a_prediction_that_is_not_finite_leaves_the_true_path():
    right = scene()
    centres = right.cameras_true.centres.copy()
    centres[3] = np.nan
    found = camera_sheet(right._replace(cameras_predicted=CameraPath(centres, right.cameras_true.forward)))
    assert count(found, COLOURED.last) == 0
    assert count(found, PALE.last) > 20


def test_the_clouds_stand_side_by_side_upright_at_one_size():
    right = scene()
    found = cloud(right._replace(points_predicted=right.points_true * (0.5, 1, 1)))
    assert found.vertices.dtype == np.float32
    left, other = found.vertices[found.vertices[:, 0] < 0], found.vertices[found.vertices[:, 0] > 0]
    assert len(left) == len(other) == 64
    np.testing.assert_allclose(np.ptp(left, axis=0) * (0.5, 1, 1), np.ptp(other, axis=0), rtol=1e-5)
    top = found.vertices[:, 1] == found.vertices[:, 1].max()
    assert set(found.colours[top][:, 0]) == {0}  # the first row of pixels
    np.testing.assert_array_equal(found.colours, np.concatenate((right.point_colours, right.point_colours)))


def test_points_that_are_lost_or_far_away_do_not_shrink_the_clouds():
    right = scene()
    predicted = right.points_true.copy()
    predicted[:10], predicted[10:12] = np.nan, 1e6
    found = cloud(right._replace(points_predicted=predicted))
    assert len(found.vertices) == len(found.colours) == 64 + 52
    assert np.abs(found.vertices).max() < 4
    none = np.zeros((0, 3))
    empty = right._replace(points_true=none, points_predicted=none, point_colours=none.astype(np.uint8))
    assert cloud(empty).vertices.shape == (0, 3)


def test_large_clouds_are_thinned_to_the_same_pixels_every_time():
    draw = np.random.default_rng(1)
    points = draw.uniform(-1, 1, (CLOUD_POINTS + 5000, 3))
    colours = draw.integers(0, 256, points.shape).astype(np.uint8)
    large = scene(points_true=points, points_predicted=points, point_colours=colours)
    found = cloud(large)
    assert len(found.vertices) == 2 * CLOUD_POINTS
    np.testing.assert_array_equal(found.colours[:CLOUD_POINTS], found.colours[CLOUD_POINTS:])
    np.testing.assert_array_equal(found.vertices, cloud(large).vertices)


def test_bars_stand_as_high_as_their_values():
    picture = bars_picture([1.0, 2.0, float("nan"), 4.0], ["a", "b", "c", "d"], "title")
    assert picture.shape == (BARS_PX[1], BARS_PX[0], 3)
    slot = (BARS_PX[0] - 2 * MARGIN) / 4
    floor, top = BARS_PX[1] - 30, 56
    heights = []
    for number in range(4):
        column = picture[56:floor, round(MARGIN + (number + 0.25) * slot)]
        heights.append(int((column != picture[60, 2]).any(axis=-1).sum()))
    assert heights[3] == pytest.approx(floor - top, abs=2)
    assert heights == pytest.approx([heights[3] / 4, heights[3] / 2, 0, heights[3]], abs=2)
    assert count(picture, FAINT) > 0
    bars_picture([float("nan")] * 3, ["a", "b", "c"], "nothing is finite")
