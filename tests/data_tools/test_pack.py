import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_clips import FOCAL, clip_labels, contents, make_raw, write_clip, write_metadata, write_video

from data_tools import info, pack
from data_tools.pack_sample import measured_error
from data_tools.work import Progress
from fw_train.camera_files import write_cameras
from fw_train.data.codec import decode_depth, decode_points, encode_depth, encode_points
from fw_train.data.manifest import ROW, Dataset
from fw_train.data.schema import parse_cameras, parse_info
from fw_train.geometry import Cameras


def arguments(*words):
    parser = argparse.ArgumentParser()
    pack.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def run_pack(raw, out, *words, workers=1):
    return pack.run(arguments(raw, out, "--workers", workers, *words))


def rejects(out):
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_packed_samples_hold_the_clips(tmp_path):
    make_raw(tmp_path / "raw")
    assert run_pack(tmp_path / "raw", tmp_path / "out", "--shard-size", 2) == 0
    assert not list((tmp_path / "out").glob(".*"))
    dataset = Dataset(tmp_path / "out")
    assert len(dataset) == 3
    depth, points, cameras = clip_labels()
    for row in range(3):
        members = dataset.read(row)
        facts = parse_info(members["json"], "json")
        assert (facts.key, facts.caption) == (f"clip_{row}", f"a tilted wall, clip_{row}")
        assert (facts.height, facts.width, facts.frames, facts.video_frames) == (32, 48, 5, 5)
        found, valid = decode_depth(members["depth.geo"])
        assert valid.all()
        error = np.abs(found - depth) / depth
        assert error.max() == pytest.approx(facts.depth.max_rel_error, rel=1e-3)
        assert 1e-4 < facts.depth.max_rel_error <= 5.01e-4
        assert facts.depth.raw_bytes == depth.nbytes
        assert facts.depth.encoded_bytes == len(members["depth.geo"])
        found, _ = decode_points(members["points.geo"])
        assert np.abs(found - points).max() < 2e-3
        kept = parse_cameras(members["camera.npy"], 5, "cameras")
        assert torch.equal(kept.cam_from_world, cameras.cam_from_world)
        assert torch.equal(kept.intrinsics_frac, cameras.intrinsics_frac)
        assert facts.scene_scale == pytest.approx(np.linalg.norm(points.astype(np.float64), axis=-1).mean(), rel=1e-5)
        assert members["mp4"] == (tmp_path / "raw" / "videos" / f"clip_{row}.mp4").read_bytes()


def test_shards_hold_one_bucket_each_in_equal_parts_sorted_by_id(tmp_path):
    raw = tmp_path / "raw"
    entries = [write_clip(raw, name) for name in ("b", "a-b", "a", "c", "d")]
    entries.append(write_clip(raw, "wide", width=64))
    entries.append(write_clip(raw, "short", frames=1))
    write_metadata(raw, entries)
    plans = pack.plan_shards(raw, pack.Settings("default", None, 4))
    assert [(p.name, str(p.bucket), [clip.id for clip in p.clips]) for p in plans] == [
        ("shard-000000", "32x48x1", ["short"]),
        ("shard-000001", "32x48x5", ["a-b", "a"]),
        ("shard-000002", "32x48x5", ["b", "c", "d"]),
        ("shard-000003", "32x64x5", ["wide"]),
    ]
    assert run_pack(raw, tmp_path / "out", "--shard-size", 4) == 0
    buckets = Dataset(tmp_path / "out").buckets
    assert [(b.bucket, b.first, b.samples) for b in buckets] == [
        ("32x48x1", 0, 1),
        ("32x48x5", 1, 5),
        ("32x64x5", 6, 1),
    ]


def test_workers_tasks_and_order_of_metadata_change_no_byte(tmp_path):
    raw = tmp_path / "raw"
    entries = make_raw(raw, clips=5)
    assert run_pack(raw, tmp_path / "one", "--shard-size", 2) == 0
    assert run_pack(raw, tmp_path / "two", "--shard-size", 2, workers=2) == 0
    write_metadata(raw, entries[::-1])
    for part in ("2/3", "3/3", "1/3"):
        assert not (tmp_path / "tasks" / "manifest.jsonl").exists()
        assert run_pack(raw, tmp_path / "tasks", "--shard-size", 2, "--task", part) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "tasks")


def broken(name):
    return pytest.param(BROKEN[name][0], BROKEN[name][1], id=name.replace(" ", "-"))


def save(path, array, **options):
    np.save(path, array, **options)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def short_cameras(raw):
    _, _, cameras = clip_labels(frames=4)
    write_cameras(raw / "camera_params/bad.txt", cameras)


def flip_video(raw):
    path = raw / "videos/bad.mp4"
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 700  # behind the encoder's description of itself
    data[at : at + 60] = bytes(60)
    path.write_bytes(data)


depth0, points0 = "depth/bad/frame_0000.npy", "points/bad/frame_0003.npy"
BROKEN = {
    "no video": (lambda raw: (raw / "videos/bad.mp4").unlink(), "no video videos/bad.mp4"),
    "no depth": (lambda raw: (raw / "depth/bad").rename(raw / "gone"), "no folder depth/bad"),
    "no points": (lambda raw: (raw / "points/bad").rename(raw / "gone"), "no folder points/bad"),
    "no cameras": (lambda raw: (raw / "camera_params/bad.txt").unlink(), "no camera file camera_params/bad.txt"),
    "gap": (lambda raw: (raw / points0).unlink(), "points/bad has no frame_0003.npy"),
    "points short": (lambda raw: (raw / "points/bad/frame_0004.npy").unlink(), "video 5, depth 5, points 4, cameras 5"),
    "cameras short": (short_cameras, "video 5, depth 5, points 5, cameras 4"),
    "video short": (lambda raw: write_video(raw / "videos/bad.mp4", 4, 32, 48), "video 4, depth 5"),
    "video long": (lambda raw: write_video(raw / "videos/bad.mp4", 50, 32, 48), "video 6, depth 5"),
    "video size": (lambda raw: write_video(raw / "videos/bad.mp4", 5, 48, 32), "is 48x32 .* says 32x48"),
    "depth size": (lambda raw: save(raw / depth0, np.ones((32, 32), "f4")), r"frame_0000.npy is float32 \[32, 32\]"),
    "depth type": (lambda raw: save(raw / depth0, np.ones((32, 48), "i4")), r"is int32 \[32, 48\]; float16"),
    "no numbers": (
        lambda raw: [save(p, np.full((32, 48), np.nan)) for p in (raw / "depth/bad").iterdir()],
        "depth/bad: no pixel has a finite positive value",
    ),
    "no points anywhere": (
        lambda raw: [save(p, np.full((32, 48, 3), np.nan)) for p in (raw / "points/bad").iterdir()],
        "points/bad: no pixel with depth has a finite point",
    ),
    "pickle": (lambda raw: save(raw / depth0, np.array([Trap()]), allow_pickle=True), "pickled objects"),
    "bare pickle": (
        lambda raw: (raw / depth0).write_bytes(b"\x80\x04cposix\nsystem\n"),
        "frame_0000.npy is no npy file",
    ),
    "cut npy": (lambda raw: (raw / depth0).write_bytes((raw / depth0).read_bytes()[:-8]), "declares 6144 bytes"),
    "corrupt video": (flip_video, "videos/bad.mp4 cannot be decoded"),
    "cut video": (
        lambda raw: (raw / "videos/bad.mp4").write_bytes((raw / "videos/bad.mp4").read_bytes()[:-900]),
        "videos/bad.mp4 cannot be decoded",
    ),
    "camera text": (lambda raw: (raw / "camera_params/bad.txt").write_text("1 2 3\n"), "line 1: 3 values"),
}


@pytest.mark.parametrize(("damage", "reason"), [broken(name) for name in BROKEN])
def test_a_clip_that_cannot_be_packed_is_left_out_with_its_reason(tmp_path, monkeypatch, damage, reason):
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, "bad"), write_clip(raw, "good")])
    damage(raw)
    assert run_pack(raw, tmp_path / "out") == 0
    found = rejects(tmp_path / "out")
    assert [reject["id"] for reject in found] == ["bad"]
    assert re.search(reason, found[0]["reason"]), found[0]["reason"]
    assert str(tmp_path) not in found[0]["reason"]
    assert Dataset(tmp_path / "out").sample(0).key == "good"
    assert len(Dataset(tmp_path / "out")) == 1
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "a.b"}, "cannot name tar members"),
        ({"id": "../bad"}, "cannot name tar members"),
        ({"id": 7}, "id: a string is needed, not 7"),
        ({"caption": None}, "caption: a string is needed"),
        ({"width": True}, "width: a whole number is needed"),
        ({"fps": 0}, "not positive"),
        ({"depth_kind": "relative"}, "'relative' is not one of metric, affine_depth, affine_disparity"),
        ({"intrinsics": [1, 1, 0.5]}, "are not \\[fx, fy, cx, cy\\]"),
        ({"original_width": 1280}, "give both"),
        ({"frames": 9}, "video 5, depth 5, points 5, cameras 5, metadata 9"),
        ({"height": 40}, "40x48 .* are not multiples of 16; .* 32x48"),
        ({"frames": 6}, "6 frames are not 4k \\+ 1"),
        ({"id": "good"}, "the id good is given 2 times"),
    ],
)
def test_a_metadata_entry_that_cannot_be_used_is_left_out(tmp_path, changes, reason):
    raw = tmp_path / "raw"
    entries = [{**write_clip(raw, "bad"), **changes}, write_clip(raw, "good"), write_clip(raw, "other")]
    write_metadata(raw, entries)
    assert run_pack(raw, tmp_path / "out") == 0
    assert re.search(reason, rejects(tmp_path / "out")[0]["reason"]), rejects(tmp_path / "out")


def test_no_usable_clip_is_an_error(tmp_path, caplog):
    raw = tmp_path / "raw"
    entry = write_clip(raw, "bad")
    for entries in ([], {"bad": entry}):
        write_metadata(raw, entries)
        with pytest.raises(ValueError, match="holds no clips"):
            run_pack(raw, tmp_path / "out")
    write_metadata(raw, [{**entry, "height": 33}])
    with pytest.raises(ValueError, match="no clip of .* can be packed; bad: 33x48"):
        run_pack(raw, tmp_path / "out")
    write_metadata(raw, [entry])
    (raw / "videos/bad.mp4").unlink()
    assert run_pack(raw, tmp_path / "out") == 1
    assert "holds no samples" in caplog.text
    with pytest.raises(ValueError, match="holds no samples: all 1 clips are in"):
        Dataset(tmp_path / "out")


def test_frames_cuts_clips_to_their_first_ones(tmp_path):
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, "long", frames=8), write_clip(raw, "short", frames=3)])
    assert run_pack(raw, tmp_path / "out", "--frames", 5) == 0
    dataset = Dataset(tmp_path / "out")
    members = dataset.read(0)
    facts = parse_info(members["json"], "json")
    assert (len(dataset), facts.key, facts.frames, facts.video_frames) == (1, "long", 5, 8)
    assert decode_depth(members["depth.geo"])[0].shape == (5, 32, 48)
    assert len(parse_cameras(members["camera.npy"], 5, "cameras").cam_from_world) == 5
    assert rejects(tmp_path / "out")[0]["reason"] == "the clip has 3 frames, `--frames` asks for 5"


def test_intrinsics_refer_to_the_clips_own_frames(tmp_path):
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, "cropped", height=32, width=32, original_width=1280, original_height=720)])
    _, _, cameras = clip_labels(height=32, width=32)
    frac = cameras.intrinsics_frac.clone()
    frac[:] = torch.tensor([0.5, 0.9, 0.5, 0.5], dtype=torch.float64)
    write_cameras(raw / "camera_params/cropped.txt", Cameras(cameras.cam_from_world, frac))
    assert run_pack(raw, tmp_path / "out") == 0
    kept = parse_cameras(Dataset(tmp_path / "out").read(0)["camera.npy"], 5, "cameras")
    # 0.5 of 1280 is 640 px, which is 640 / 720 of the square crop's side.
    assert kept.intrinsics_frac[0].tolist() == pytest.approx([640 / 720, 0.9, 0.5, 0.5])


def test_pose_rows_take_their_intrinsics_from_the_metadata(tmp_path):
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, "poses", intrinsics=[FOCAL, 1.8, 0.5, 0.25])])
    rows = (raw / "camera_params/poses.txt").read_text().splitlines()
    (raw / "camera_params/poses.txt").write_text("\n".join(" ".join(row.split()[7:]) for row in rows))
    assert run_pack(raw, tmp_path / "out") == 0
    kept = parse_cameras(Dataset(tmp_path / "out").read(0)["camera.npy"], 5, "cameras")
    assert kept.intrinsics_frac.tolist() == [[FOCAL, 1.8, 0.5, 0.25]] * 5
    assert kept.cam_from_world[3, 0, 3] == pytest.approx(-0.3)


def test_holes_and_captions(tmp_path, capsys, caplog):
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, "holes", caption="  "), write_clip(raw, "whole")])
    depth, points, _ = clip_labels()
    depth[2, :16], points[2, :16] = np.nan, np.inf
    np.save(raw / "depth/holes/frame_0002.npy", depth[2])
    np.save(raw / "points/holes/frame_0002.npy", points[2])
    assert run_pack(raw, tmp_path / "out") == 0
    assert "1 samples have no caption" in caplog.text
    members = Dataset(tmp_path / "out").read(0)
    facts = parse_info(members["json"], "json")
    assert facts.depth.valid_fraction == facts.points.valid_fraction == 0.9
    assert np.array_equal(decode_points(members["points.geo"])[1], np.isfinite(depth))
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    assert info.run(parser.parse_args([str(tmp_path / "out")])) == 0
    text = capsys.readouterr().out
    assert "2 samples in 1 shards" in text
    assert re.search(r"32x48x5 +2 +1 ", text)
    assert "captions missing: 1" in text
    assert "clips rejected: 0" in text


def test_lossless_labels_come_back_whole(tmp_path):
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, "a")])
    depth, points, _ = clip_labels()
    depth[1, 3, 4], points[1, 3, 4] = -2.5, np.nan
    np.save(raw / "depth/a/frame_0001.npy", depth[1])
    np.save(raw / "points/a/frame_0001.npy", points[1])
    assert run_pack(raw, tmp_path / "out", "--preset", "lossless") == 0
    members = Dataset(tmp_path / "out").read(0)
    facts = parse_info(members["json"], "json")
    assert (facts.depth.max_rel_error, facts.depth.lossless_frames, facts.points.lossless_frames) == (0, 5, 5)
    assert np.array_equal(decode_depth(members["depth.geo"])[0], depth)
    assert np.array_equal(decode_points(members["points.geo"])[0], points, equal_nan=True)


def test_the_error_is_measured_on_what_the_file_holds():
    depth, points, _ = clip_labels()
    seen = np.ones(depth.shape, bool)
    assert measured_error("depth", depth * np.float32(1.25), seen, encode_depth(depth).data) == pytest.approx(
        0.2, rel=3e-3
    )
    # Seen from the first frame's camera, which is the origin, points are off by a fifth of their distance.
    first = encode_points(points[:1]).data
    assert measured_error("points", points[:1] * np.float32(1.25), seen[:1], first) == pytest.approx(0.2, rel=3e-3)
    lossless = encode_depth(depth, preset="lossless").data
    assert measured_error("depth", depth, seen, lossless) == 0
    with pytest.raises(ValueError, match="depth, frame 0: values changed in the lossless codec"):
        measured_error("depth", depth * 2, seen, lossless)
    seen[2, 0, 0] = False
    with pytest.raises(ValueError, match="depth, frame 2: the mask of valid pixels changed"):
        measured_error("depth", depth, seen, lossless)


def test_running_again_keeps_finished_shards_and_restores_others(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    make_raw(raw, clips=3)
    assert run_pack(raw, out, "--shard-size", 1) == 0
    whole = contents(out)
    kept = (out / "shard-000001.tar").stat().st_ino
    os.truncate(out / "shard-000000.tar", 5000)
    (out / "shard-000002.index.jsonl").write_bytes(whole["shard-000002.index.jsonl"].replace(b"clip_2", b"clip_9"))
    (out / "samples.bin").unlink()
    assert run_pack(raw, out, "--shard-size", 1) == 0
    assert contents(out) == whole
    assert (out / "shard-000001.tar").stat().st_ino == kept


def test_shards_of_another_plan_are_not_mixed_in(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    entries = make_raw(raw, clips=3)
    assert run_pack(raw, out, "--shard-size", 2) == 0
    before = contents(out)
    with pytest.raises(ValueError, match="was packed with .*preset='default'.* this run has .*preset='tight'"):
        run_pack(raw, out, "--shard-size", 2, "--preset", "tight")
    write_metadata(raw, [*entries[:2], {**entries[2], "caption": "another"}])
    with pytest.raises(ValueError, match="shard-000001 was packed from other clips or other metadata"):
        run_pack(raw, out, "--shard-size", 2)
    write_metadata(raw, entries[:1])
    with pytest.raises(ValueError, match="holds shard-000001, which .* does not give"):
        run_pack(raw, out, "--shard-size", 2)
    assert contents(out) == before


def test_manifest_only_needs_every_shard(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    make_raw(raw, clips=2)
    assert run_pack(raw, out, "--shard-size", 1, "--task", "1/2") == 0
    assert run_pack(raw, out, "--shard-size", 1, "--manifest-only") == 1
    assert not (out / "manifest.jsonl").exists()
    assert run_pack(raw, out, "--shard-size", 1, "--task", "2/2") == 0
    whole = contents(out)
    for name in ("manifest.jsonl", "samples.bin", "rejects.jsonl"):
        (out / name).unlink()
    assert run_pack(raw, out, "--shard-size", 1, "--manifest-only") == 0
    assert contents(out) == whole


def test_the_task_of_a_slurm_array():
    def task(this, count, least, **more):
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
        return pack.slurm_task({**dict(zip(names, map(str, (this, count, least)), strict=True)), **more})

    assert pack.slurm_task({}) is None
    assert [task(this, 4, 0) for this in range(4)] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert task(12, 4, 10) == (3, 4)
    assert task(14, 3, 10, SLURM_ARRAY_TASK_STEP="2") == (3, 3)
    with pytest.raises(ValueError, match="SLURM array task 9 is not one of 3 from 1"):
        task(9, 3, 1)
    with pytest.raises(ValueError, match="incomplete"):
        pack.slurm_task({"SLURM_ARRAY_TASK_ID": "3"})
    assert pack.parse_task("3/8") == (3, 8)
    for text in ("0/8", "9/8", "3", "a/b", "1/0"):
        with pytest.raises(argparse.ArgumentTypeError):
            pack.parse_task(text)


def test_the_progress_line():
    progress = Progress(100, "clips")
    assert progress.text(5) == "0/100 clips, 0.00 clips/s, ? left"
    progress.done = 20
    assert progress.text(10) == "20/100 clips, 2.00 clips/s, 0:00:40 left"
    assert progress.text(20000) == "20/100 clips, 0.00 clips/s, 22:13:20 left"


def test_unknown_metadata_is_named(tmp_path, caplog):
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, "a", seed=3)])
    assert run_pack(raw, tmp_path / "out") == 0
    assert "seed (1 clips)" in caplog.text


def test_webdataset_reads_the_shards_as_documented(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    make_raw(raw, clips=3)
    assert run_pack(raw, out, "--shard-size", 2) == 0
    page = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text()
    (code,) = re.findall(r"<!-- a test runs this block -->\n```python\n(.*?)```", page, re.DOTALL)
    names = {"urls": sorted(map(str, out.glob("*.tar")))}
    exec(code, names)
    samples = list(names["samples"])
    depth, points, _ = clip_labels()
    assert [sample["key"] for sample in samples] == ["clip_0", "clip_1", "clip_2"]
    for sample in samples:
        assert sample["info"]["frames"] == 5
        assert sample["cameras"][3].tolist()[:4] == [1, 0, 0, pytest.approx(-0.3)]
        assert np.abs(sample["depth"][0] / depth - 1).max() < 5.1e-4
        assert np.abs(sample["points"][0] - points).max() < 2e-3
        assert sample["video"][4:8] == b"ftyp"


def test_the_documented_row_is_the_row_of_the_table():
    page = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text()
    assert f"`samples.bin`: {ROW.itemsize} bytes a row" in page
