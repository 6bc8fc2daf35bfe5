import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from raw_clips import clip_labels

from fw_train.data.augment import Augmentation, draw_view
from fw_train.data.codec import decode_codes, encode_depth, encode_points
from fw_train.data.codec_torch import expand
from fw_train.data.schema import Bucket
from fw_train.data.transform import (
    CropResize,
    cover_crop,
    crop_intrinsics,
    crop_resize_labels,
    cut_codes,
    nearest_size,
    resize_video,
)
from fw_train.geometry import intrinsics_px, unproject

sides = st.integers(2, 400)


@given(height=sides, width=sides, to_height=sides, to_width=sides)
def test_the_window_covers_the_size_in_the_middle(height, width, to_height, to_width):
    crop = cover_crop(height, width, to_height, to_width)
    top, left, rows, columns = crop.window
    assert not any(side % 2 for side in crop.window)
    assert top + rows <= height
    assert left + columns <= width
    assert abs(2 * top + rows - height) <= 3
    assert abs(2 * left + columns - width) <= 3
    scale = min(height / to_height, width / to_width)
    assert abs(rows - to_height * scale) <= max(1.01, 2 - to_height * scale)
    assert abs(columns - to_width * scale) <= max(1.01, 2 - to_width * scale)
    down, right = crop.slack
    corner = crop.moved(down, right).window
    assert (corner[0] + rows, corner[1] + columns) <= (height, width)


def test_a_frame_of_the_wanted_shape_is_kept_whole():
    crop = cover_crop(336, 592, 336, 592)
    assert crop.keeps_all
    assert not crop.scales
    crop = cover_crop(64, 96, 32, 48)
    assert crop.keeps_all
    assert crop.scales
    assert cover_crop(48, 96, 48, 48) == CropResize((48, 96), (0, 24, 48, 48), (48, 48))


def test_the_nearest_shape_is_chosen():
    sizes = ((336, 592), (592, 336), (288, 512))
    assert nearest_size(720, 1280, sizes) == (288, 512)
    assert nearest_size(400, 704, sizes) == (336, 592)
    assert nearest_size(1280, 720, sizes) == (592, 336)
    assert nearest_size(480, 480, ((336, 592), (400, 416))) == (400, 416)
    assert nearest_size(176, 320, ((320, 560), (160, 288), (336, 592))) == (160, 288)


def test_an_edge_stays_an_edge_and_nothing_leaves_its_place():
    depth = torch.where(torch.arange(48) < 24, 2.0, 9.0).expand(3, 32, 48)
    for to in ((32, 48), (16, 32), (48, 48), (20, 44), (64, 96)):
        crop = cover_crop(32, 48, *to)
        cut = crop_resize_labels(depth, crop)
        assert cut.shape == (3, *to)
        assert set(cut.unique().tolist()) == {2.0, 9.0}
        assert torch.equal(cut[0, 0] == 2.0, torch.arange(to[1]) < to[1] // 2)


def test_points_depth_and_intrinsics_agree_after_cropping():
    depth, points, cameras = clip_labels(frames=1, height=48, width=96)
    crop = cover_crop(48, 96, 16, 16).moved(0, 3)
    # Three old pixels become one, so that its centre is an old pixel's centre.
    assert crop.window == (0, 6, 48, 48)
    cut_depth, cut_points = (
        crop_resize_labels(torch.from_numpy(labels), crop) for labels in (depth, np.moveaxis(points, -1, 1))
    )
    new_px = intrinsics_px(crop_intrinsics(cameras.intrinsics_frac, crop), 16, 16)
    again = unproject(cut_depth.double(), new_px, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(again, cut_points.double(), atol=1e-5)
    wrong = unproject(cut_depth.double(), new_px + torch.tensor([0, 0, 0.1, 0]), torch.eye(4, dtype=torch.float64))
    assert not torch.allclose(wrong, cut_points.double(), atol=1e-3)


@pytest.mark.parametrize("preset", ["default", "lossless"])
def test_codes_are_cut_before_they_are_expanded(preset):
    depth, points, _ = clip_labels(frames=3, height=32, width=48)
    valid = np.ones(depth.shape, bool)
    valid[1, 8:20, 10:30] = False
    for encoded in (encode_depth(depth, valid, preset=preset), encode_points(points, valid, preset=preset)):
        codes = decode_codes(encoded.data, [0, 1])
        for crop in (cover_crop(32, 48, 16, 16), cover_crop(32, 48, 32, 16).moved(0, 0), cover_crop(32, 48, 48, 16)):
            cut = cut_codes(codes, crop)
            assert cut.deltas.shape[-1] == cut.exact.shape[-1] == crop.window[1] + crop.window[3]
            for whole, part in zip(expand(codes, "cpu"), expand(cut, "cpu"), strict=True):
                assert torch.equal(crop_resize_labels(part, crop), crop_resize_labels(whole, crop))


def test_video_is_blended_without_moving():
    ramp = torch.linspace(-1, 1, 96).expand(2, 3, 48, 96)
    crop = cover_crop(48, 96, 24, 24)
    window = ramp[..., crop.window[1] : crop.window[1] + crop.window[3]]
    small = resize_video(window, crop)
    assert small.shape == (2, 3, 24, 24)
    assert torch.allclose(small[..., 4:-4], window.unflatten(-1, (24, 2)).mean(-1)[..., :24, 4:-4], atol=1e-5)
    stacked = resize_video(window.unflatten(0, (1, 2)), crop)
    assert torch.equal(stacked[0], small)
    same = cover_crop(48, 96, 48, 96)
    assert resize_video(ramp, same) is ramp


BUCKET = Bucket(32, 48, 21)
EVERYTHING = Augmentation(random_crop=True, max_temporal_stride=3, flip=0.5, colour_jitter=0.2)


def test_without_augmentation_the_first_frames_and_the_middle_are_seen():
    for position in (0, 5, 10**12):
        view = draw_view(BUCKET, 9, (32, 32), Augmentation(), 3, position)
        assert view == (tuple(range(9)), cover_crop(32, 48, 32, 32), False, None)


def test_views_are_drawn_from_seed_and_position():
    def views(seed, augmentation=EVERYTHING):
        return [draw_view(BUCKET, 9, (32, 32), augmentation, seed, position) for position in range(300)]

    def plain(views):
        return [(view.frames, view.crop, view.flipped) for view in views]

    some = views(0)
    assert plain(some) == plain(views(0))
    assert plain(some) != plain(views(1))
    assert all(torch.equal(a.colours, b.colours) for a, b in zip(some, views(0), strict=True))
    # All that is possible occurs, and nothing else.
    strides = {view.frames[1] - view.frames[0] for view in some}
    assert strides == {1, 2}
    assert {len(view.frames) for view in some} == {9}
    assert {view.frames[0] for view in some if view.frames[1] - view.frames[0] == 1} == set(range(13))
    assert {view.frames[0] for view in some if view.frames[1] - view.frames[0] == 2} == set(range(5))
    assert {view.crop.window for view in some} == {(0, 2 * step, 32, 32) for step in range(9)}
    assert 100 < sum(view.flipped for view in some) < 200
    # Switching one off leaves what the others draw.
    without = views(0, Augmentation(random_crop=True, flip=0.5))
    assert [view.crop for view in some] == [view.crop for view in without]
    assert [view.flipped for view in some] == [view.flipped for view in without]
    assert {view.frames for view in without} == {tuple(range(9))}


def test_colours_change_as_brightness_contrast_and_saturation_do():
    grey = torch.tensor([[0.2], [0.2], [0.2], [1.0]])
    red = torch.tensor([[0.8], [-0.4], [-0.4], [1.0]])
    for position in range(20):
        colours = draw_view(BUCKET, 9, (32, 32), Augmentation(colour_jitter=0.3), 0, position).colours
        r, g, b = (colours @ grey)[:, 0].tolist()
        assert r == pytest.approx(g, abs=1e-6)
        assert g == pytest.approx(b, abs=1e-6)
        assert abs(r - 0.2) > 1e-4
        assert -0.4 < r < 0.8
        r, g, b = (colours @ red)[:, 0].tolist()
        assert r - g == pytest.approx(1.2, rel=0.3 + 0.3 + 0.3 + 0.3)
        assert g == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize("wrong", [{"max_temporal_stride": 0}, {"flip": 1.5}, {"colour_jitter": -0.1}])
def test_impossible_augmentations_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1, flip"):
        Augmentation(**wrong)


def test_augmentations_that_are_on_are_named():
    assert Augmentation().changes == ()
    assert EVERYTHING.changes == ("random_crop", "max_temporal_stride", "flip", "colour_jitter")
