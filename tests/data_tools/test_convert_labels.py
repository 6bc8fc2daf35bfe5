"""Predictions of networks: where their pixels lie in the frames, labels added to clips, and poses that depth contradicts."""

import re

import numpy as np
import pytest
import torch
from foreign_clips import (
    FRAMES,
    convert,
    dust3r_arrays,
    entries,
    make_scene,
    opengl_c2w,
    result,
    vggt_arrays,
    write_colmap,
    write_frames,
    write_nerfstudio,
    write_re10k,
)
from raw_clips import contents

from data_tools.convert_labels import vggt_region
from data_tools.framing import Region, centred, fitted_region, frame_labels, region_intrinsics, unchanged
from data_tools.pose_check import check_poses
from fw_train.cli import main
from fw_train.geometry import Cameras, mirror_cameras


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene") / "raw")


@pytest.fixture(scope="module")
def converted(scene, tmp_path_factory):
    """A raw folder with the scene as COLMAP's, cameras, depth and points."""
    folder = tmp_path_factory.mktemp("converted")
    write_colmap(scene, folder / "clip")
    assert convert("colmap", folder / "clip", folder / "raw", "--caption", "a room") == 0
    return folder / "raw"


@pytest.fixture
def raw(converted, tmp_path):
    """A copy of that folder."""
    for name, data in contents(converted).items():
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(data)
    return tmp_path / "raw"


@pytest.mark.parametrize(
    ("picture", "labels", "region"),
    [
        ((1080, 1920), (294, 518), Region(0, 0, 1080, 1920)),  # 291.4 became 294: stretched
        ((64, 96), (350, 518), Region(0, 0, 64, 96)),
        ((1920, 1080), (518, 518), Region((1920 - 1920 * 518 / 924) / 2, 0, 1920 * 518 / 924, 1080)),  # middle of 924
        ((720, 1280), (518, 518), Region(-280, 0, 1280, 1280)),  # white above and below
        ((480, 640), (32, 43), Region(0, 0, 480, 640)),
    ],
)
def test_vggt_sees_frames_as_its_loader_makes_them(picture, labels, region):
    assert vggt_region(picture, labels) == pytest.approx(region)


def test_frames_that_no_loader_makes_need_to_be_explained():
    with pytest.raises(ValueError, match=r"labels of 100x518 .* pictures of 720x1280: .*--fit whole, crop or pad"):
        vggt_region((720, 1280), (100, 518))


@pytest.mark.parametrize(
    ("fit", "region"),
    [
        ("whole", Region(0, 0, 64, 96)),
        ("crop", Region(0, 16, 64, 64)),
        ("pad", Region(-16, 0, 96, 96)),
    ],
)
def test_labels_of_a_square_network(fit, region):
    assert fitted_region((64, 96), (32, 32), fit) == region


def test_a_pixel_takes_the_label_at_its_centre():
    labels = np.arange(16 * 16).reshape(16, 16)
    region = Region(-16, 0, 96, 96)  # a label is six pixels wide; padding above and below
    framed = frame_labels(labels, region, unchanged(64, 96))
    for row, column in ((0, 0), (1, 5), (2, 6), (63, 95)):
        assert framed[row, column] == labels[(row + 16) // 6, column // 6]
    beyond = frame_labels(labels, Region(0, 16, 64, 64), unchanged(64, 96))
    assert np.isnan(beyond[:, :16]).all()
    assert np.isnan(beyond[:, 80:]).all()
    assert np.isfinite(beyond[:, 16:80]).all()


def test_intrinsics_of_a_region_are_those_of_the_pictures():
    """A focal length of 40 pixels and a centre at (50, 20) of 64x96 pixels, in the middle 64x64."""
    inner = torch.tensor([40 / 64, 40 / 64, (50 - 16) / 64, 20 / 64])
    expected = [40 / 96, 40 / 64, 50 / 96, 20 / 64]
    assert region_intrinsics(inner, Region(0, 16, 64, 64), (64, 96)).tolist() == pytest.approx(expected)


def test_a_clip_keeps_only_what_labels_cover():
    framing = centred((64, 96), None, Region(0, 16.4, 64, 63.2))
    assert framing == ((64, 96), (0, 24, 64, 48), (64, 48))
    assert centred((64, 96), (32, 16), None) == ((64, 96), (0, 32, 64, 32), (32, 16))
    with pytest.raises(ValueError, match="12x96 pixels are too few; give --size"):
        centred((12, 96), None, None)


@pytest.mark.parametrize("tool", ["vggt", "dust3r"])
def test_a_square_networks_labels_lie_where_it_looked(scene, tmp_path, tool):
    """The network saw the middle 64x64 pixels."""
    arrays = {"vggt": vggt_arrays, "dust3r": dust3r_arrays}[tool](scene)
    middle = np.s_[:, :, 16:80]
    for name in ("depth", "depths", "depth_conf", "world_points", "pts3d"):
        if name in arrays:
            arrays[name] = arrays[name][middle]
    if tool == "vggt":
        arrays["intrinsic"] = arrays["intrinsic"] - [[0, 0, 16], [0, 0, 0], [0, 0, 0]]
    else:
        arrays["principal_points"] = arrays["principal_points"] - [16, 0]
    np.savez(tmp_path / "clip.npz", **arrays)
    video = write_frames(scene, tmp_path / "frames")
    fit = ["--fit", "crop"] if tool == "vggt" else []
    assert convert(tool, tmp_path / "clip.npz", tmp_path / "raw", "--video", video, *fit) == 0
    cameras, depth, points = result(tmp_path / "raw")
    np.testing.assert_array_equal(depth, scene.depth[middle])
    np.testing.assert_allclose(points, scene.points[middle], atol=1e-4, rtol=1e-4)
    expected = [scene.focal_px / 64, scene.focal_px / 64, (scene.cx - 16) / 64, scene.cy / 64]
    np.testing.assert_allclose(cameras.intrinsics_frac, [expected] * FRAMES, atol=1e-6)


def test_dust3r_without_principal_points_looks_along_the_middle(scene, tmp_path):
    arrays = dust3r_arrays(scene)
    del arrays["principal_points"]
    np.savez(tmp_path / "clip.npz", **arrays)
    assert (
        convert("dust3r", tmp_path / "clip.npz", tmp_path / "raw", "--video", write_frames(scene, tmp_path / "f")) == 0
    )
    cameras, _, _ = result(tmp_path / "raw")
    assert cameras.intrinsics_frac[:, 2:].tolist() == [[0.5, 0.5]] * FRAMES


def test_the_demos_folder_of_vggt_needs_no_options(scene, tmp_path):
    """Its npz has a pickled None in it, which is not touched, and its frames lie beside it."""
    folder = tmp_path / "living_room"
    write_frames(scene, folder / "images")
    np.savez(folder / "predictions.npz", pose_enc_list=None, **vggt_arrays(scene))
    assert convert("vggt", folder / "predictions.npz", tmp_path / "raw", "--fps", "10") == 0
    assert [(entry["id"], entry["fps"]) for entry in entries(tmp_path / "raw")] == [("living_room", 10)]


def test_npy_files_and_a_batch_axis_are_read_too(scene, tmp_path):
    (tmp_path / "clip").mkdir()
    for name, values in vggt_arrays(scene).items():
        np.save(tmp_path / "clip" / f"{name}.npy", values[None])
    video = write_frames(scene, tmp_path / "frames")
    assert convert("vggt", tmp_path / "clip", tmp_path / "raw", "--video", video) == 0
    np.testing.assert_array_equal(result(tmp_path / "raw")[1], scene.depth)


def test_unsure_labels_are_invalid(scene, tmp_path):
    arrays = vggt_arrays(scene)
    arrays["depth_conf"][:, :, :40] = 0.4
    np.savez(tmp_path / "clip.npz", **arrays)
    command = ["vggt", tmp_path / "clip.npz", tmp_path / "raw", "--video", write_frames(scene, tmp_path / "frames")]
    assert convert(*command) == 0
    assert np.isfinite(result(tmp_path / "raw")[1][:, -1, :40]).all()
    assert convert(*command, "--min-confidence", "0.5") == 0
    _, depth, points = result(tmp_path / "raw")
    assert np.isnan(depth[:, :, :40]).all()
    assert np.isnan(points[:, :, :40]).all()
    np.testing.assert_array_equal(depth[:, :, 40:], scene.depth[:, :, 40:])


def test_relative_depth_replaces_depth_alone(scene, raw, tmp_path):
    before = contents(raw)
    inverse = 1 / np.nan_to_num(scene.depth, nan=1e6)
    np.save(tmp_path / "clip.npy", inverse)
    assert convert("depth-anything", tmp_path / "clip.npy", raw, "--depth-kind", "affine_disparity") == 0
    after = contents(raw)
    changed = {name.split("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"depth", "metadata.json"}
    assert before.keys() == after.keys()
    np.testing.assert_array_equal(result(raw)[1], inverse.astype(np.float32))
    (entry,) = entries(raw)
    assert (entry["depth_kind"], entry["caption"]) == ("affine_disparity", "a room")
    assert main(["data", "pack", str(raw), str(tmp_path / "packed"), "--workers", "1"]) == 0
    assert main(["data", "verify", str(tmp_path / "packed")]) == 0


def test_metric_depth_makes_points_of_a_clip_with_cameras(scene, tmp_path):
    raw = tmp_path / "raw"
    write_re10k(scene, tmp_path / "cameras", tmp_path / "frames")
    assert convert("re10k", tmp_path / "cameras", raw, "--pictures", tmp_path / "frames") == 0
    video = (raw / "videos" / "clip.mp4").read_bytes()
    np.savez(tmp_path / "clip.npz", depths=scene.depth)
    assert convert("depth-anything", tmp_path / "clip.npz", raw, "--depth-kind", "metric") == 0
    _, depth, points = result(raw)
    np.testing.assert_array_equal(depth, scene.depth)
    np.testing.assert_allclose(points, scene.points, atol=1e-4, rtol=1e-4)
    assert (raw / "videos" / "clip.mp4").read_bytes() == video
    # Repeating the first command finds its clip, and does not undo the second.
    assert convert("re10k", tmp_path / "cameras", raw, "--pictures", tmp_path / "frames") == 0
    assert (raw / "depth" / "clip").is_dir()


def test_a_file_for_each_frame(scene, raw, tmp_path):
    (tmp_path / "clip").mkdir()
    for t, depth in enumerate(scene.depth):
        np.save(tmp_path / "clip" / f"{t}_raw_depth_meter.npy", 2 * depth)
    assert convert("depth-anything", tmp_path / "clip", raw, "--depth-kind", "affine_depth") == 0
    np.testing.assert_array_equal(result(raw)[1], 2 * scene.depth)


def test_a_folder_of_npy_files_holds_a_clip_each_if_they_have_several_frames(scene, raw, tmp_path):
    folder = tmp_path / "depth"
    folder.mkdir()
    np.save(folder / "clip.npy", 4 * scene.depth)
    np.save(folder / "other.npy", scene.depth)
    assert convert("depth-anything", folder, raw, "--depth-kind", "affine_depth") == 1  # there is no clip `other`
    np.testing.assert_array_equal(result(raw)[1], 4 * scene.depth)


def test_a_folder_of_npz_files_serves_the_clips_of_the_raw_folder(scene, raw, tmp_path):
    folder = tmp_path / "predictions"
    folder.mkdir()
    np.savez(folder / "clip.npz", **(vggt_arrays(scene) | {"depth": scene.depth.clip(0, 2)}))
    assert convert("vggt", folder, raw) == 0
    np.testing.assert_array_equal(result(raw)[1], scene.depth.clip(0, 2))


def test_predictions_for_a_clip_that_is_there_keep_its_video(scene, raw, tmp_path):
    video = (raw / "videos" / "clip.mp4").read_bytes()
    arrays = vggt_arrays(scene)
    arrays["depth"] = 3 * arrays["depth"]
    arrays["extrinsic"][:, :, 3] *= 3
    np.savez(tmp_path / "clip.npz", **arrays)
    assert convert("vggt", tmp_path / "clip.npz", raw) == 0
    cameras, depth, points = result(raw)
    assert (raw / "videos" / "clip.mp4").read_bytes() == video
    np.testing.assert_allclose(cameras.cam_from_world[:, :3, 3], 3 * scene.translation, atol=1e-6)
    np.testing.assert_allclose(points, 3 * scene.points, atol=1e-3, rtol=1e-4)
    assert np.isfinite(depth).any()
    assert entries(raw)[0]["caption"] == "a room"
    assert convert("vggt", tmp_path / "clip.npz", raw, "--size", "32x32") == 1


@pytest.mark.parametrize(
    ("named", "write"),
    [
        ("inverted", lambda r, t: np.vstack((np.column_stack((r, t)), (0, 0, 0, 1)))),  # COLMAP's matrices
        ("in other axes", lambda r, t: np.linalg.inv(np.vstack((np.column_stack((r, t)), (0, 0, 0, 1))))),
        ("inverted and in other axes", lambda r, t: np.linalg.inv(opengl_c2w(r, t))),
    ],
)
def test_poses_of_another_convention_in_transforms_json_are_named(scene, tmp_path, monkeypatch, caplog, named, write):
    monkeypatch.setattr("foreign_clips.opengl_c2w", write)
    write_nerfstudio(scene, tmp_path / "clip", depth="npy")
    assert convert("nerfstudio", tmp_path / "clip", tmp_path / "raw") == 1
    assert re.search(rf"if their poses are {named}( \(|;)", caplog.text)
    assert not (tmp_path / "raw" / "metadata.json").exists()


def test_depth_in_other_units_than_the_cameras_is_doubted(scene, raw, tmp_path, caplog):
    np.save(tmp_path / "clip.npy", scene.depth * 0.2)
    assert convert("depth-anything", tmp_path / "clip.npy", raw, "--depth-kind", "metric") == 0
    assert "fit together if the depth is about 5.7 times as large" in caplog.text


def test_depth_and_cameras_that_agree_are_not_doubted(scene):
    depth = torch.from_numpy(scene.depth[::4]).double()
    poses = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    poses[:, :3, :3] = torch.from_numpy(scene.rotation[::4])
    poses[:, :3, 3] = torch.from_numpy(scene.translation[::4])
    pixels = torch.tensor([[scene.focal_px, scene.focal_px, scene.cx, scene.cy]] * 3)
    check = check_poses(depth, pixels, poses)
    assert check.error < 0.02
    assert check.better == ""
    mirrored = mirror_cameras(Cameras(poses, pixels))
    assert check_poses(depth, pixels, mirrored.cam_from_world).error > check.error
