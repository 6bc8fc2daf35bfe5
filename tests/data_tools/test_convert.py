"""Every source's fixture of one scene gives the same cameras, and the same depth and points where it has them."""

import json

import numpy as np
import pytest
from foreign_clips import (
    FRAMES,
    HEIGHT,
    WIDTH,
    dust3r_arrays,
    make_scene,
    vggt_arrays,
    write_colmap,
    write_image,
    write_nerfstudio,
    write_re10k,
)

from fw_train.camera_files import read_cameras
from fw_train.cli import main
from fw_train.data.schema import video_facts


@pytest.fixture(scope="session")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene") / "raw")


def convert(*arguments):
    return main(["data", "convert", *map(str, arguments), "--workers", "1"])


def result(raw, clip):
    cameras = read_cameras(raw / "camera_params" / f"{clip}.txt")
    labels = [
        np.stack([np.load(path) for path in sorted((raw / kind / clip).glob("*.npy"))])
        if (raw / kind / clip).is_dir()
        else None
        for kind in ("depth", "points")
    ]
    return cameras, *labels


def frames_of(scene, folder):
    for t, picture in enumerate(scene.pictures):
        write_image(folder / f"{t:04}.png", picture)
    return folder


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
    return ["vggt", tmp / "clip.npz", tmp / "raw", "--video", frames_of(scene, tmp / "pictures")]


def dust3r(scene, tmp, without=()):
    arrays = dust3r_arrays(scene)
    np.savez(tmp / "clip.npz", **{name: value for name, value in arrays.items() if name not in without})
    return ["dust3r", tmp / "clip.npz", tmp / "raw", "--video", frames_of(scene, tmp / "pictures")]


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
    cameras, depth, points = result(tmp_path / "raw", "clip")
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
    (entry,) = json.loads((tmp_path / "raw" / "metadata.json").read_text())
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
