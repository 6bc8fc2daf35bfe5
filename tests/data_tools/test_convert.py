"""Every source's fixture of one scene gives the same cameras, and the same depth and points where it has them."""

import json
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from foreign_clips import (
    FRAMES,
    HEIGHT,
    WIDTH,
    convert,
    dust3r_arrays,
    entries,
    make_scene,
    result,
    vggt_arrays,
    write_colmap,
    write_frames,
    write_nerfstudio,
    write_re10k,
)
from raw_clips import contents, write_clip, write_metadata

from data_tools.shared_folder import only_writer
from fw_train.cli import main
from fw_train.data.schema import video_facts
from fw_train.pictures.video_writer import video_writer


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene") / "raw")


def re10k(scene, tmp):
    write_re10k(scene, tmp / "cameras", tmp / "frames")
    return ["re10k", tmp / "cameras", tmp / "raw", "--pictures", tmp / "frames"]


def colmap(scene, tmp, **kind):
    write_colmap(scene, tmp / "clip", **kind)
    return ["colmap", tmp / "clip", tmp / "raw"]


def nerfstudio(scene, tmp, **kind):
    write_nerfstudio(scene, tmp / "clip", **kind)
    return ["nerfstudio", tmp / "clip", tmp / "raw"]


def vggt(scene, tmp, without=()):
    arrays = vggt_arrays(scene)
    np.savez(tmp / "clip.npz", **{name: value for name, value in arrays.items() if name not in without})
    return ["vggt", tmp / "clip.npz", tmp / "raw", "--video", write_frames(scene, tmp / "pictures")]


def dust3r(scene, tmp, without=()):
    arrays = dust3r_arrays(scene)
    np.savez(tmp / "clip.npz", **{name: value for name, value in arrays.items() if name not in without})
    return ["dust3r", tmp / "clip.npz", tmp / "raw", "--video", write_frames(scene, tmp / "pictures")]


SOURCES = {
    "re10k": re10k,
    "colmap binary": colmap,
    "colmap text": lambda scene, tmp: colmap(scene, tmp, binary=False, model="SIMPLE_PINHOLE"),
    "nerfstudio png": nerfstudio,
    "nerfstudio npy": lambda scene, tmp: nerfstudio(scene, tmp, depth="npy"),
    "vggt": vggt,
    "vggt points": lambda scene, tmp: vggt(scene, tmp, without=("depth", "depth_conf")),
    "dust3r": dust3r,
    "dust3r points": lambda scene, tmp: dust3r(scene, tmp, without=("depths",)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_clip(scene, tmp_path, source):
    assert convert(*SOURCES[source](scene, tmp_path)) == 0
    cameras, depth, points = result(tmp_path / "raw")
    np.testing.assert_allclose(cameras.cam_from_world[:, :3, :3], scene.rotation, atol=1e-6)
    np.testing.assert_allclose(cameras.cam_from_world[:, :3, 3], scene.translation, atol=1e-6)
    fractions = [scene.focal_px / WIDTH, scene.focal_px / HEIGHT, scene.cx / WIDTH, scene.cy / HEIGHT]
    np.testing.assert_allclose(cameras.intrinsics_frac, [fractions] * FRAMES, atol=1e-6)
    facts = video_facts((tmp_path / "raw/videos/clip.mp4").read_bytes(), "clip", FRAMES)
    assert facts == (FRAMES, HEIGHT, WIDTH)
    if source == "re10k":
        assert depth is None
        assert points is None
        return
    step = 0.0006 if source == "nerfstudio png" else 1e-5  # whole millimetres
    assert depth.dtype == points.dtype == np.float32
    np.testing.assert_allclose(depth, scene.depth, atol=step, rtol=1e-5)
    np.testing.assert_allclose(points, scene.points, atol=3 * step, rtol=1e-4)
    assert np.isnan(depth).any()
    (entry,) = entries(tmp_path / "raw")
    assert (entry["id"], entry["height"], entry["width"], entry["frames"]) == ("clip", HEIGHT, WIDTH, FRAMES)
    assert entry["depth_kind"] == "metric"


def test_a_folder_of_scenes_goes_through_pack_and_verify(scene, tmp_path):
    for clip in ("one", "two"):
        write_colmap(scene, tmp_path / "scenes" / clip)
    raw, packed = tmp_path / "raw", tmp_path / "packed"
    assert convert("colmap", tmp_path / "scenes", raw, "--caption", "a room") == 0
    assert main(["data", "pack", str(raw), str(packed), "--workers", "1"]) == 0
    assert main(["data", "verify", str(packed)]) == 0
    assert (packed / "rejects.jsonl").read_text() == ""
    rows = [json.loads(line) for line in (packed / "shard-000000.index.jsonl").read_text().splitlines()[1:-1]]
    assert [row["key"] for row in rows] == ["one", "two"]


def test_frames_labels_and_intrinsics_are_cut_together(scene, tmp_path):
    """Every second frame from the third on, the middle 64x64 at half the size."""
    write_nerfstudio(scene, tmp_path / "clip", depth="npy")
    out = tmp_path / "raw"
    cut = ["--size", "32x32", "--start", 1, "--stride", 2, "--frames", 1]
    assert convert("nerfstudio", tmp_path / "clip", out, *cut) == 0
    cut[-1] = 5
    assert convert("nerfstudio", tmp_path / "clip", out, *cut) == 1  # only four are there
    cut[3] = 0
    assert convert("nerfstudio", tmp_path / "clip", out, *cut) == 0
    cameras, depth, points = result(out)
    rotation, translation = scene.rotation[::2], scene.translation[::2]
    np.testing.assert_allclose(cameras.cam_from_world[:, :3, :3], rotation, atol=1e-9)
    np.testing.assert_array_equal(depth, scene.depth[::2, 1::2, 17:81:2])
    left = (WIDTH - HEIGHT) // 2
    side = HEIGHT
    expected = [scene.focal_px / side, scene.focal_px / side, (scene.cx - left) / side, scene.cy / side]
    np.testing.assert_allclose(cameras.intrinsics_frac, [expected] * 5, atol=1e-9)
    # A pixel's centre lies on the corner of four of the source's.
    u, v = np.meshgrid(np.arange(32) * 2 + 1 + left, np.arange(32) * 2 + 1)
    rays = np.stack(((u - scene.cx) / scene.focal_px, (v - scene.cy) / scene.focal_px, np.ones((32, 32))), axis=-1)
    for t in range(5):
        world = (rays * depth[t][..., None].astype(float) - translation[t]) @ rotation[t]
        np.testing.assert_allclose(points[t], world @ rotation[0].T + translation[0], atol=1e-4)
    with av.open(str(out / "videos" / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 12  # half of 24
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    means = scene.pictures[::2, :, left : left + side].reshape(5, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    assert np.abs(decoded - means).mean() < 6
    others = np.abs(decoded[1:] - means[:-1]).mean(axis=(1, 2, 3))
    assert (np.abs(decoded - means).mean(axis=(1, 2, 3))[1:] < others).all()
    assert (entries(out)[0]["fps"], entries(out)[0]["frames"]) == (12, 5)


def test_without_a_size_the_middle_of_whole_tokens_stays(scene, tmp_path):
    cropped = scene._replace(
        pictures=scene.pictures[:, 3:-2, 1:-4], depth=scene.depth[:, 3:-2, 1:-4], cx=scene.cx - 1, cy=scene.cy - 3
    )
    arrays = vggt_arrays(scene) | {"depth": cropped.depth}
    arrays["intrinsic"] = arrays["intrinsic"] - [[0, 0, 1], [0, 0, 3], [0, 0, 0]]
    np.savez(tmp_path / "clip.npz", **arrays)
    video = write_frames(cropped, tmp_path / "pictures")
    assert convert("vggt", tmp_path / "clip.npz", tmp_path / "raw", "--video", video) == 0
    cameras, depth, points = result(tmp_path / "raw")
    # 59x91 pixels from row 3, column 1; 48x80 of them from row 3 + 5, column 1 + 5
    np.testing.assert_array_equal(depth, scene.depth[:, 8:56, 6:86])
    np.testing.assert_allclose(points, scene.points[:, 8:56, 6:86], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(cameras.intrinsics_frac[0, 2:], [(scene.cx - 6) / 80, (scene.cy - 8) / 48], atol=1e-9)


def test_a_repeated_command_keeps_what_is_there_and_makes_the_same_bytes(scene, tmp_path):
    for clip in ("one", "two"):
        write_colmap(scene, tmp_path / "scenes" / clip)
    raw = tmp_path / "raw"
    command = ["data", "convert", "colmap", str(tmp_path / "scenes"), str(raw)]
    assert main([*command, "--workers", "1"]) == 0
    first = contents(raw)
    video = raw / "videos" / "one.mp4"
    time = video.stat().st_mtime_ns
    assert main([*command, "--workers", "1"]) == 0
    assert (contents(raw), video.stat().st_mtime_ns) == (first, time)
    shutil.rmtree(raw / "points" / "one")  # as a run that was killed leaves it
    (raw / ".unfinished" / "one").mkdir(parents=True)
    (raw / "metadata.json").write_bytes((raw / "metadata.json").read_bytes().replace(b"converted_from", b"old"))
    assert main([*command, "--workers", "1"]) == 0
    assert contents(raw) == first
    assert video.stat().st_mtime_ns != time


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same_bytes(scene, tmp_path):
    for clip in ("one", "two"):
        write_colmap(scene, tmp_path / "scenes" / clip)
    for workers in ("1", "2"):
        assert (
            main(["data", "convert", "colmap", str(tmp_path / "scenes"), str(tmp_path / workers), "--workers", workers])
            == 0
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_other_clips_of_the_folder_stay_as_they_are(scene, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_metadata(raw, [write_clip(raw, "mine"), {"id": "clip", "caption": "kept", "fps": 1}])
    before = contents(raw)
    write_colmap(scene, tmp_path / "clip")
    assert convert("colmap", tmp_path / "clip", raw) == 0
    mine, clip = entries(raw)
    assert (mine, clip["caption"], clip["fps"]) == (json.loads(before["metadata.json"])[0], "kept", 24)
    assert {name: data for name, data in contents(raw).items() if "mine" in name} == {
        name: data for name, data in before.items() if "mine" in name
    }


def test_a_clip_that_is_converted_anew_loses_labels_that_no_longer_fit(scene, tmp_path):
    raw = tmp_path / "raw"
    write_colmap(scene, tmp_path / "a" / "clip")
    write_colmap(scene, tmp_path / "b" / "clip", depth=False)
    assert convert("colmap", tmp_path / "a" / "clip", raw) == 0
    assert (raw / "depth" / "clip").is_dir()
    assert convert("colmap", tmp_path / "b" / "clip", raw) == 0
    assert not (raw / "depth" / "clip").exists()
    assert not (raw / "points" / "clip").exists()


def test_one_scene_that_fails_does_not_stop_the_others(scene, tmp_path, caplog, capsys):
    for clip in ("a", "b", "c"):
        write_colmap(scene, tmp_path / "scenes" / clip)
    (tmp_path / "scenes" / "b" / "sparse" / "images.bin").unlink()
    assert convert("colmap", tmp_path / "scenes", tmp_path / "raw") == 1
    assert [entry["id"] for entry in entries(tmp_path / "raw")] == ["a", "c"]
    assert "b: no " in caplog.text
    assert "2 clips converted, 0 were there, 1 failed" in capsys.readouterr().out
    assert not any("b" in Path(name).parts or "b.mp4" in name for name in contents(tmp_path / "raw"))
    assert not (tmp_path / "raw" / ".unfinished").exists()


def test_missing_labels_are_named_with_the_step_that_makes_them(scene, tmp_path, caplog):
    assert convert(*re10k(scene, tmp_path)) == 0
    assert re.search(r"1 clips have no depth \(clip\).*fw data convert vggt.*docs/labels.md", caplog.text)


def test_the_whole_video_of_a_clip_is_cut_by_timestamps(scene, tmp_path):
    """The clip begins 0.5 s into a video of 16 frames a second, which is named by the id in the URL."""
    write_re10k(scene, tmp_path / "cameras", tmp_path / "frames")
    file = tmp_path / "cameras" / "clip.txt"
    file.write_text(re.sub(r"(?m)^77(\d{6}) ", lambda match: f"{500_000 + int(match[1])} ", file.read_text()))
    dark = np.zeros((8, HEIGHT, WIDTH, 3), np.uint8)
    with video_writer(tmp_path / "frames" / "abcdefghijk.mp4", 16, HEIGHT, WIDTH) as add:
        for picture in (*dark, *scene.pictures, *dark):
            add(np.ascontiguousarray(picture))
    shutil.rmtree(tmp_path / "frames" / "clip")
    assert convert("re10k", tmp_path / "cameras", tmp_path / "raw", "--pictures", tmp_path / "frames") == 0
    with av.open(str(tmp_path / "raw" / "videos" / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(float)
    apart = np.array([[np.abs(ours - theirs).mean() for theirs in scene.pictures.astype(float)] for ours in decoded])
    np.testing.assert_array_equal(apart.argmin(axis=1), range(FRAMES))
    assert apart.min(axis=1).max() < 8  # colours have lost half their resolution twice
    assert entries(tmp_path / "raw")[0]["source"] == "RealEstate10K https://www.youtube.com/watch?v=abcdefghijk"


def test_two_commands_do_not_write_to_one_folder(scene, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    with only_writer(tmp_path / "raw", "held by the test"):
        assert convert(*colmap(scene, tmp_path)) == 1
    assert "another command writes to" in capsys.readouterr().err
