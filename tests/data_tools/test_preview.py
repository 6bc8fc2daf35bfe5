import argparse
import zlib

import av
import numpy as np
import pytest
from raw_clips import clip_labels, contents, make_raw, write_clip, write_metadata

from data_tools import pack, preview
from data_tools.normals import normal_picture, surface_normals
from fw_train.data.manifest import Dataset
from fw_train.data.shards import ShardError
from fw_train.geometry import relative_to_first
from fw_train.pictures import camera_path, colours, drawing

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

HEIGHT, WIDTH = 32, 48
CAMERA_BLUE = (128, 128, 255)  # of the normal (0, 0, -1)


def run(command, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def decode(path):
    """Pixels of a PNG by another decoder than numpy and zlib."""
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def where_is(picture, colour):
    """(column, row) of the mean of all pixels of a colour."""
    rows, columns = np.nonzero((picture == np.array(colour)).all(axis=-1))
    assert len(rows), f"no pixel is {colour}"
    return columns.mean(), rows.mean()


def poses(*centres):
    path = np.tile(np.eye(4), (len(centres), 1, 1))
    path[:, :3, 3] = centres
    return path


def one_path(*centres):
    return [camera_path.path_of_poses(poses(*centres))]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Three clips; the first one's depth and points have a hole at the upper left, `lossless` NaNs."""
    folder = tmp_path_factory.mktemp("preview")
    make_raw(folder / "raw")
    for path in sorted((folder / "raw").glob("depth/clip_0/*")) + sorted((folder / "raw").glob("points/clip_0/*")):
        labels = np.load(path)
        labels[:8, :16] = np.nan
        np.save(path, labels)
    assert run(pack, folder / "raw", folder / "out", "--workers", 1, "--preset", "lossless") == 0
    return folder / "out"


def test_the_sheet_is_a_png_with_four_rows_of_three_panels_and_the_path(packed, tmp_path, capsys):
    file = tmp_path / "sheet.png"
    assert run(preview, packed, "clip_1", "--png", file) == 0
    assert capsys.readouterr().out == f"{file}\n"
    picture = decode(file)
    scale = drawing.NARROW // WIDTH
    width = 3 * scale * WIDTH + drawing.NARROW + 3 * drawing.MARGIN
    rows = 4 * (scale * HEIGHT + drawing.SMALL * drawing.LEADING)
    legend = 2 * drawing.SMALL * drawing.LEADING
    lines = (drawing.LARGE + 2 * drawing.SMALL) * drawing.LEADING  # key, caption, facts
    assert picture.shape == (lines + rows + legend + 9 * drawing.MARGIN, width + 2 * drawing.MARGIN, 3)
    dataset = Dataset(packed)
    drawn = preview.draw(preview.read_preview(dataset, dataset.find("clip_1"), 4))
    np.testing.assert_array_equal(picture, drawn)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_the_chunks_of_a_png_have_their_check_sums():
    data = drawing.png_bytes(np.zeros((2, 3, 3), np.uint8))
    kinds, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        body, check = data[at + 4 : at + 8 + size], data[at + 8 + size : at + 12 + size]
        assert zlib.crc32(body) == int.from_bytes(check)
        kinds.append(body[:4])
        at += size + 12
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]


def test_the_same_sample_gives_the_same_bytes_and_others_give_others(packed, tmp_path):
    for name, key in (("a", "clip_1"), ("b", "clip_1"), ("c", "clip_2")):
        assert run(preview, packed, key, "--png", tmp_path / name) == 0
    files = contents(tmp_path)
    assert files["a"] == files["b"] != files["c"]


def test_without_a_key_the_first_sample_is_drawn_under_its_name(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(preview, packed) == 0
    assert run(preview, packed, "clip_0", "--png", tmp_path / "named.png") == 0
    assert (tmp_path / "clip_0.png").read_bytes() == (tmp_path / "named.png").read_bytes()


def test_a_failed_write_leaves_nothing_behind(packed, tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(IsADirectoryError):
        run(preview, packed, "--png", tmp_path / "taken.png")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_an_unknown_key_names_the_nearest(packed, tmp_path):
    with pytest.raises(ShardError, match=r"no sample 'clip_22'; the nearest of its 3 keys: clip_2, clip_0, clip_1"):
        run(preview, packed, "clip_22", "--png", tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_the_nearest_of_many_keys_are_found():
    keys = np.array([f"scene_{i:05}" for i in range(5000)] + ["kitchen_a", "kitchen_b"], "S80")
    assert preview.nearest_keys(keys, "kitchem_b") == ["kitchen_b", "kitchen_a", "scene_00000"]
    assert preview.nearest_keys(keys, "scene_4321")[0] == "scene_04321"


def test_frames_are_evenly_apart_with_both_ends():
    assert preview.even_frames(9, 4) == (0, 3, 5, 8)
    assert preview.even_frames(81, 5) == (0, 20, 40, 60, 80)
    assert preview.even_frames(3, 4) == (0, 1, 2)
    assert preview.even_frames(5, 1) == (0,)


def test_what_is_drawn_is_what_was_packed(packed):
    drawn = preview.read_preview(Dataset(packed), 1, 3)
    depth, points, cameras = clip_labels()
    assert drawn.chosen == (0, 2, 4)
    np.testing.assert_array_equal(drawn.depth, depth)
    np.testing.assert_array_equal(drawn.points, points[[0, 2, 4]])
    np.testing.assert_array_equal(drawn.first_from_cam, relative_to_first(cameras.cam_from_world).numpy())
    brightness = np.add.outer(np.arange(HEIGHT) * 5, np.arange(WIDTH) * 3)[None] + np.array([0, 40, 80])[:, None, None]
    below_wrap = brightness < 200
    off = np.abs(drawn.video.mean(axis=-1) - brightness)[below_wrap]
    assert off.mean() < 4  # h264 and chroma, not another frame, which is 40 away


def test_a_video_that_is_displayed_upright_is_drawn_upright(packed):
    dataset = Dataset(packed)
    data = dataset.read(1, ["mp4"])["mp4"]
    upright = preview.video_pictures(data, (0,), "clip")
    one, end = 1 << 16, 1 << 30

    def turned(*matrix):
        """The first frame with another display matrix in the track header: a, b, u, c, d, v, x, y, w."""
        straight, other = (np.array(m, ">i4").tobytes() for m in ((one, 0, 0, 0, one, 0, 0, 0, end), matrix))
        at = data.index(straight, data.index(b"tkhd"))
        return preview.video_pictures(data[:at] + other + data[at + len(other) :], (0,), "clip")[0]

    upside_down = turned(-one, 0, 0, 0, -one, 0, WIDTH * one, HEIGHT * one, end)
    np.testing.assert_array_equal(upside_down, upright[0, ::-1, ::-1])
    clockwise = turned(0, one, 0, -one, 0, 0, HEIGHT * one, 0, end)
    np.testing.assert_array_equal(clockwise, upright[0, ::-1].swapaxes(0, 1))


def test_near_is_bright_and_depth_is_told_apart_in_order():
    depth = np.linspace(1, 10, 400, dtype=np.float32).reshape(1, 1, 400)
    valid = np.ones_like(depth, bool)
    scale = colours.depth_scale(depth, valid)
    assert scale == pytest.approx(tuple(np.percentile(1 / depth, (2, 98))), rel=1e-6)
    luminance = colours.depth_picture(depth[0], valid[0], scale)[0] @ np.array((0.2126, 0.7152, 0.0722))
    assert (np.diff(luminance) < 1).all()  # colours are rounded
    assert luminance[0] - luminance[-1] > 180
    steps = np.diff(colours.heat_colours(np.linspace(0, 1, 64)) @ np.array((0.2126, 0.7152, 0.0722)))
    assert (steps > 0).all()


def test_one_scale_serves_all_frames_of_a_clip(packed):
    drawn = preview.read_preview(Dataset(packed), 1, 4)
    depth = np.ones_like(drawn.depth) * np.arange(1, 6, dtype=np.float32)[:, None, None]
    picture = preview.draw(drawn._replace(depth=depth))
    for distance in depth[list(drawn.chosen), 0, 0]:
        colour = colours.heat_colours((1 / distance - 1 / 5) / (1 - 1 / 5))
        pixels = (picture == colour).all(axis=-1).sum()
        assert pixels >= HEIGHT * WIDTH * (drawing.NARROW // WIDTH) ** 2, f"no panel has the colour of {distance} m"


def test_depth_without_range_and_without_valid_pixels():
    depth, valid = np.full((1, 4, 8), 3, np.float32), np.ones((1, 4, 8), bool)
    flat = colours.depth_picture(depth[0], valid[0], colours.depth_scale(depth, valid))
    assert (flat == colours.heat_colours(np.array(0.5))).all()
    nothing = colours.depth_scale(depth, ~valid)
    assert nothing == (0, 0)
    assert set(np.unique(colours.depth_picture(depth[0], ~valid[0], nothing))) == {104, 152}
    assert (
        colours.depth_legend(nothing, 200, " m").shape
        == colours.depth_legend(colours.DepthScale(0.1, 1), 200, " m").shape
    )


def test_invalid_pixels_are_grey_checks_and_no_others_are(packed):
    drawn = preview.read_preview(Dataset(packed), 0, 1)
    hole = np.zeros((HEIGHT, WIDTH), bool)
    hole[:8, :16] = True
    assert np.isnan(drawn.points[0][hole]).all()
    scale = colours.depth_scale(drawn.depth, drawn.depth_valid)
    normals = surface_normals(drawn.points[0], drawn.points_valid[0], np.eye(4))
    for picture in (
        colours.depth_picture(drawn.depth[0], drawn.depth_valid[0], scale),
        normal_picture(*normals),
    ):
        grey = (picture == picture[..., :1]).all(axis=-1) & np.isin(picture[..., 0], (104, 152))
        np.testing.assert_array_equal(grey, hole)
        tile = colours.CHECK
        assert picture[0, 0, 0] == picture[tile - 1, tile - 1, 0] == picture[tile, tile, 0] == 104
        assert picture[0, tile, 0] == picture[tile, 0, 0] == 152


def test_a_wall_that_faces_the_camera_has_the_colour_of_minus_z():
    rows, columns = np.indices((HEIGHT, WIDTH)).astype(np.float32)
    points = np.stack((columns - 20, rows - 10, np.full_like(rows, 50)), axis=-1)
    normals, known = surface_normals(points, np.ones((HEIGHT, WIDTH), bool), np.eye(4))
    assert known.all()
    np.testing.assert_allclose(normals, np.broadcast_to((0, 0, -1), normals.shape), atol=1e-6)
    assert (normal_picture(normals, known) == CAMERA_BLUE).all()


def test_normals_of_a_tilted_wall_before_a_turned_camera():
    _, points, _ = clip_labels(frames=1)
    valid = np.ones((HEIGHT, WIDTH), bool)
    want = np.array((0.3, 0, -1)) / np.hypot(0.3, 1)  # z = 2 + 0.3 x, seen from z = 0
    normals, _ = surface_normals(points[0], valid, np.eye(4))
    np.testing.assert_allclose(normals, np.broadcast_to(want, normals.shape), atol=2e-4)
    # A camera turned towards the wall's normal sees it face on.
    angle = np.arctan(0.3)
    turned = np.eye(4)
    turned[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    normals, known = surface_normals(points[0], valid, turned)
    np.testing.assert_allclose(normals, np.broadcast_to((0, 0, -1), normals.shape), atol=2e-4)
    assert (np.abs(normal_picture(normals, known).astype(int) - CAMERA_BLUE) <= 1).all()


def test_red_is_right_and_green_is_up():
    normals = np.array([[[1, 0, 0], [0, -1, 0], [0, 0, -1]]], np.float32)
    picture = normal_picture(normals, np.ones((1, 3), bool))
    np.testing.assert_array_equal(picture[0], [[255, 128, 128], [128, 255, 128], [128, 128, 255]])


def test_normals_hold_up_to_the_edge_of_a_step():
    rows, columns = np.indices((HEIGHT, WIDTH)).astype(np.float32)
    deep = np.where(columns < 24, 50, 90)
    points = np.stack((columns, rows, deep), axis=-1).astype(np.float32)
    normals, _ = surface_normals(points, np.ones((HEIGHT, WIDTH), bool), np.eye(4))
    np.testing.assert_allclose(normals, np.broadcast_to((0, 0, -1), normals.shape), atol=1e-6)


def test_a_camera_that_moves_right_has_dots_that_move_right():
    picture = camera_path.path_picture(one_path(*[(0.1 * t, 0, 0) for t in range(5)]), [], 320, 0.01)
    dots = np.array([where_is(picture, camera_path.camera_colour(t, 5)) for t in range(5)])
    np.testing.assert_allclose(np.diff(dots[:, 0]), (320 - 2 * camera_path.PATH_PADDING_PX) / 4, atol=0.6)
    np.testing.assert_allclose(dots[:, 1], 159.5, atol=0.6)


def test_a_camera_that_moves_ahead_has_dots_that_move_up_and_height_plays_no_part():
    picture = camera_path.path_picture(one_path((0, 0, 0), (0, -7, 0.5), (0, 3, 1)), [], 200, 0.01)
    dots = np.array([where_is(picture, camera_path.camera_colour(t, 3)) for t in range(3)])
    np.testing.assert_allclose(dots[:, 0], 99.5, atol=0.6)
    np.testing.assert_allclose(np.diff(dots[:, 1]), -(200 - 2 * camera_path.PATH_PADDING_PX) / 2, atol=0.6)


def test_only_the_first_camera_has_a_ring_and_marked_ones_a_triangle_along_the_view():
    turned = poses((0, 0, 0), (1, 0, 0))
    turned[1, :3, :3] = [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]  # looks to the right
    path = [camera_path.path_of_poses(turned)]
    plain, marked = camera_path.path_picture(path, [], 200, 0.1), camera_path.path_picture(path, [1], 200, 0.1)
    ring, first = where_is(plain, drawing.WHITE), where_is(plain, camera_path.COLOURED.first)
    assert ring == pytest.approx(first, abs=0.6)
    dot, triangle = where_is(plain, camera_path.COLOURED.last), where_is(marked, camera_path.COLOURED.last)
    assert triangle[0] > dot[0] + 5
    assert triangle[1] == pytest.approx(dot[1], abs=0.6)
    ahead = camera_path.path_picture(path, [0], 200, 0.1)
    assert where_is(ahead, camera_path.COLOURED.first)[1] < first[1] - 5


def test_a_camera_that_stays_is_drawn_in_the_middle():
    picture = camera_path.path_picture(one_path((0, 0, 0), (0, 0, 0)), [0, 1], 200, 0.5)
    assert where_is(picture, camera_path.COLOURED.last)[0] == pytest.approx(99.5, abs=0.6)
    assert camera_path.grid_step(one_path((0, 0, 0)), 200, 0.5) == pytest.approx(0.2)


def test_text_is_readable_cut_at_the_edge_and_wrapped():
    picture = drawing.text_picture(["L|~", "é?"], 14, 1, drawing.WHITE)
    lit = (picture == drawing.WHITE).all(axis=-1)
    assert ["".join(np.where(row, "#", ".")) for row in lit[:7, :9]] == [
        "#.......#",
        "#.......#",
        "#.......#",
        "#.......#",
        "#.......#",
        "#.......#",
        "#####...#",
    ]
    question = lit[11:19, 6:11]
    assert question.any()
    np.testing.assert_array_equal(lit[11:19, :5], question)  # what is not ASCII
    assert drawing.wrap("one two  three", 8 * 6, 1, 2) == ["one two", "three"]
    assert drawing.wrap("one two three four", 8 * 6, 1, 2) == ["one two", "three..."]
    assert drawing.wrap("abcdefghijkl", 8 * 6, 1, 3) == ["abcdefgh", "ijkl"]


def test_panels_are_enlarged_and_reduced_by_whole_numbers():
    colours = np.random.default_rng(0).integers(0, 256, (16, 64, 3), np.uint8)
    np.testing.assert_array_equal(drawing.fit(colours)[::5, ::5], colours)
    large = np.repeat(np.repeat(colours, 22, axis=0), 22, axis=1)  # 1408 wide
    assert drawing.fit(large).shape == (16 * 22 // 3, 1408 // 3, 3)
    checks = np.indices((4, 1000)).sum(axis=0)[..., None] % 2 * np.full(3, 200, np.uint8)
    assert (drawing.fit(checks.astype(np.uint8)) == 100).all()


@pytest.mark.parametrize(("height", "width", "frames"), [(64, 32, 5), (16, 16, 1)])
def test_tall_and_tiny_clips_with_a_long_caption(tmp_path, height, width, frames):
    entry = write_clip(tmp_path / "raw", "k" * 80, frames, height, width, caption="words " * 300)
    write_metadata(tmp_path / "raw", [entry])
    assert run(pack, tmp_path / "raw", tmp_path / "out", "--workers", 1) == 0
    assert run(preview, tmp_path / "out", "--png", tmp_path / "tall.png") == 0
    scale = drawing.NARROW // width
    assert decode(tmp_path / "tall.png").shape[0] > scale * height * min(frames, 4)
