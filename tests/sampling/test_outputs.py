"""The files of a clip, read back by other programs: trimesh, pycolmap, ffprobe, PyAV."""

import json
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from fw_train.camera_files import read_cameras
from fw_train.geometry import Cameras, invert_rigid
from fw_train.pictures.drawing import gray16_png_bytes
from fw_train.sampling.colmap import colmap_model, quaternions
from fw_train.sampling.outputs import Clip, depth_steps, new_folder, write_clip
from fw_train.sampling.ply import PointCloud, chosen_points, ply_bytes
from fw_train.sampling.trajectories import generated_trajectory, square_pixels

FRAMES, HEIGHT, WIDTH = 5, 32, 48


def random_rotations(count, seed=0):
    matrices = torch.randn(count, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(matrices)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    return q * torch.linalg.det(q)[:, None, None]


def make_cloud(count=1000):
    rng = np.random.default_rng(0)
    return PointCloud(
        rng.normal(size=(count, 3)).astype(np.float32),
        rng.integers(0, 256, (count, 3)).astype(np.uint8),
        rng.uniform(1, 9, count).astype(np.float32),
    )


def make_clip():
    rng = np.random.default_rng(1)
    fractions = square_pixels(torch.tensor(0.8, dtype=torch.float64), (HEIGHT, WIDTH))
    depth = rng.uniform(0.2, 7, (FRAMES, HEIGHT, WIDTH)).astype(np.float32)
    depth[0, :3] = np.inf
    return Clip(
        np.full((FRAMES, HEIGHT, WIDTH, 3), (200, 60, 30), np.uint8),
        depth,
        make_cloud(),
        generated_trajectory("orbit", 0.7, FRAMES, 1.0, fractions).cameras(),
        np.zeros((20, 30, 3), np.uint8),
        Fraction(16),
        {"seed": 3},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "out"
    with new_folder(folder) as partial:
        write_clip(partial, make_clip())
    return folder


def test_trimesh_reads_the_points(written):
    trimesh = pytest.importorskip("trimesh", reason="trimesh reads the point cloud independently; pip install trimesh")
    cloud, expected = trimesh.load(written / "points.ply"), make_cloud()
    np.testing.assert_array_equal(np.asarray(cloud.vertices, np.float32), expected.points)
    np.testing.assert_array_equal(np.asarray(cloud.colors)[:, :3], expected.colours)


def test_the_points_file_has_the_bytes_of_its_header():
    cloud = make_cloud(2)
    header, _, body = ply_bytes(cloud).partition(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 2\nproperty float x\n")
    assert len(body) == 2 * (3 * 4 + 3 + 4)
    assert np.frombuffer(body[:12], "<f4").tolist() == cloud.points[0].tolist()
    assert list(body[12:15]) == cloud.colours[0].tolist()


def test_the_least_confident_points_and_those_without_a_place_are_left_away():
    points = np.arange(30, dtype=np.float32).reshape(10, 3)
    points[4, 1] = np.nan
    confidence = np.array([1, 9, 8, 2, 9, 7, 3, 6, 5, 4], np.float32)
    kept = chosen_points(points, np.zeros((10, 3), np.uint8), confidence, dropped=0.34, most=100, seed=0)
    assert kept.confidence.tolist() == [9, 8, 7, 6, 5, 4]  # in the order of the pixels
    few = chosen_points(points, np.zeros((10, 3), np.uint8), confidence, dropped=0.34, most=4, seed=0)
    assert len(few.points) == 4
    assert set(few.confidence) <= set(kept.confidence)
    again = chosen_points(points, np.zeros((10, 3), np.uint8), confidence, dropped=0.34, most=4, seed=0)
    assert np.array_equal(few.points, again.points)


def test_quaternions_turn_as_their_rotations_do():
    half_turns = torch.diag_embed(torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64))
    rotation = torch.cat((random_rotations(50), half_turns, torch.eye(3, dtype=torch.float64)[None]))
    w, x, y, z = quaternions(rotation).unbind(-1)
    assert (w >= 0).all()
    rows = (
        torch.stack((1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)), -1),
        torch.stack((2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)), -1),
        torch.stack((2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)), -1),
    )
    torch.testing.assert_close(torch.stack(rows, dim=-2), rotation)


def test_pycolmap_reads_the_model(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap reads the model independently; pip install pycolmap")
    poses = torch.eye(4, dtype=torch.float64).repeat(6, 1, 1)
    poses[:, :3, :3], poses[:, :3, 3] = random_rotations(6), torch.arange(18, dtype=torch.float64).reshape(6, 3)
    fractions = torch.tensor((0.9, 1.2, 0.45, 0.55), dtype=torch.float64).expand(6, 4)
    cloud = make_cloud(7)
    names = [f"frame_{number:04}.png" for number in range(6)]
    model = colmap_model(Cameras(poses, fractions), (HEIGHT, WIDTH), names, cloud)
    for name, data in zip(("cameras", "images", "points3D"), model, strict=True):
        (tmp_path / f"{name}.txt").write_bytes(data)
    found = pycolmap.Reconstruction(str(tmp_path))
    assert sorted(image.name for image in found.images.values()) == names
    for number, image in found.images.items():
        np.testing.assert_allclose(image.cam_from_world().matrix(), poses[number - 1, :3], atol=1e-12)
        camera = found.cameras[image.camera_id]
        assert (camera.width, camera.height) == (WIDTH, HEIGHT)
        np.testing.assert_allclose(camera.params, (0.9 * WIDTH, 1.2 * HEIGHT, 0.45 * WIDTH, 0.55 * HEIGHT))
    points = [found.points3D[number] for number in sorted(found.points3D)]
    np.testing.assert_allclose([point.xyz for point in points], cloud.points)
    np.testing.assert_array_equal([point.color for point in points], cloud.colours)


def test_predicted_cameras_are_a_camera_file(written):
    found, expected = read_cameras(written / "cameras.txt", FRAMES), make_clip().cameras
    assert torch.equal(found.cam_from_world, expected.cam_from_world)
    assert torch.equal(found.intrinsics_frac, expected.intrinsics_frac)
    rows = [line.split() for line in (written / "colmap/images.txt").read_text().splitlines() if "png" in line]
    centres = invert_rigid(expected.cam_from_world)[:, :3, 3]
    for row, pose, centre in zip(rows, expected.cam_from_world, centres, strict=True):
        translation = torch.tensor([float(value) for value in row[5:8]], dtype=torch.float64)
        torch.testing.assert_close(-pose[:3, :3].T @ translation, centre)


def read_gray16(path):
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name.startswith("gray16")
    return frame.to_ndarray().astype(np.uint16)


def test_depth_images_times_their_scale_are_the_depth(written):
    scale = json.loads((written / "sample.json").read_text())["depth"]["scale"]
    depth = make_clip().depth
    names = sorted(path.name for path in (written / "depth").iterdir())
    assert names == [f"frame_{number:04}.png" for number in range(FRAMES)]
    for number, name in enumerate(names):
        found = read_gray16(written / "depth" / name)
        known = np.isfinite(depth[number])
        assert (found[~known] == 0).all()
        np.testing.assert_allclose(found[known] * scale, depth[number][known], atol=0.51 * scale)


def test_depth_uses_the_whole_range_and_keeps_zero_for_none(tmp_path):
    steps, unit = depth_steps(np.array([[[1e-9, 3.0], [1.5, 2.0]]], np.float32), np.array([[[1, 1], [1, 0]]], bool))
    assert steps.tolist() == [[[1, 65535], [32768, 0]]]
    assert unit == pytest.approx(3 / 65535)
    (tmp_path / "x.png").write_bytes(gray16_png_bytes(steps[0]))
    assert read_gray16(tmp_path / "x.png").tolist() == steps[0].tolist()


def probe(path):
    wanted = "stream=codec_name,width,height,avg_frame_rate,nb_read_frames"
    words = ["ffprobe", "-v", "error", "-count_frames", "-show_entries", wanted, "-of", "json", str(path)]
    (stream,) = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["streams"]
    return stream


@pytest.mark.parametrize("name", ["video.mp4", "depth.mp4"])
def test_ffprobe_reads_the_videos(written, name):
    try:
        stream = probe(written / name)
    except FileNotFoundError:
        pytest.skip("ffprobe is not installed; apt-get install ffmpeg")
    assert (stream["codec_name"], stream["width"], stream["height"]) == ("h264", WIDTH, HEIGHT)
    assert (stream["avg_frame_rate"], stream["nb_read_frames"]) == ("16/1", str(FRAMES))


def test_the_video_shows_the_frames(written):
    with av.open(str(written / "video.mp4")) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.abs(np.stack(pictures).astype(int) - make_clip().frames).max() <= 4


def test_a_folder_is_replaced_when_it_holds_a_sample_and_never_otherwise(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with new_folder(out) as folder:
            (folder / "sample.json").write_text(text)
            (folder / text).write_text("")
    assert sorted(path.name for path in out.iterdir()) == ["sample.json", "two"]
    with pytest.raises(ZeroDivisionError), new_folder(out):
        _ = 1 / 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "sample.json", "two"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with (
        pytest.raises(ValueError, match=r"holds no earlier sample \(sample.json\); give another --output"),
        new_folder(tmp_path / "mine"),
    ):
        pass
    assert (tmp_path / "mine" / "thesis.tex").exists()
