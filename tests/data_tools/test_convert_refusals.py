"""What cannot be converted is refused with its place and remedy, and leaves nothing behind."""

import io
import json
import math
import re
import tracemalloc
import zipfile

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
    vggt_arrays,
    write_colmap,
    write_frames,
    write_image,
    write_nerfstudio,
    write_re10k,
)

from fw_train.cli import main
from fw_train.pictures.video_writer import video_writer


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene") / "raw")


@pytest.fixture
def refused(tmp_path, caplog, capsys):
    """Runs a command that must fail with a message, and leave no clip."""

    def refused(message, *arguments):
        assert convert(*arguments) == 1
        said = caplog.text + capsys.readouterr().err
        assert re.search(message, said), said
        assert not (tmp_path / "raw" / "metadata.json").exists()
        assert not [path for path in (tmp_path / "raw").rglob("*") if path.is_file()]

    return refused


def edit(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def cut_short(path, by=10):
    path.write_bytes(path.read_bytes()[:-by])


def in_image_rows(path, change):
    """Applies a change to the list of images of a text model, two lines each."""
    lines = path.read_text().splitlines()
    pairs = [lines[i : i + 2] for i in range(1, len(lines), 2)]
    path.write_text("\n".join([lines[0], *(line for pair in change(pairs) for line in pair)]) + "\n")


COLMAP_TEXT = [
    (r"no .*cameras\.bin or cameras\.txt in .*sparse", lambda f: (f / "sparse/cameras.txt").unlink()),
    (r"no .*images\.txt", lambda f: (f / "sparse/images.txt").unlink()),
    (r"view_004\.png.*images that .* has not", lambda f: (f / "images/view_004.png").unlink()),
    (r"no folder .*images; the frames lie there", lambda f: (f / "images").rename(f / "pictures")),
    (r"is not IMAGE_ID QW", lambda f: in_image_rows(f / "sparse/images.txt", lambda pairs: [["1 2 3", ""], *pairs])),
    (r"an image has camera 7, which", lambda f: edit(f / "sparse/cameras.txt", b"7 PINHOLE", b"8 PINHOLE")),
    (r"PINHOLE has 4 parameters, not 5", lambda f: edit(f / "sparse/cameras.txt", b"53 31", b"53 31 0")),
    (r"camera 7 is 64x192 .*the images are 64x96", lambda f: edit(f / "sparse/cameras.txt", b" 96 64 ", b" 192 64 ")),
    (r"view_003.png is 32x96 .*view_000.png is 64x96",
     lambda f: write_image(f / "images/view_003.png", np.zeros((32, 96, 3), np.uint8))),
    (r"view_002\.png cannot be read as an image", lambda f: (f / "images/view_002.png").write_bytes(b"nothing")),
    (
        r"frame 4 \(view_004\.png\) cannot be used: the model has no pose for it; .* --start 0 --frames 1\b",
        lambda f: in_image_rows(f / "sparse/images.txt", lambda pairs: [pair for pair in pairs if "view_004" not in pair[0]]),
    ),
    (
        r"frame 8 \(view_008\.png\) cannot be used: no .*view_008\.png\.geometric\.bin; .* --start 0 --frames 5\b",
        lambda f: (f / "stereo/depth_maps/view_008.png.geometric.bin").unlink(),
    ),
    (r"view_001.*declares 96x64x1 float32 and has \d+ bytes",
     lambda f: cut_short(f / "stereo/depth_maps/view_001.png.geometric.bin")),
    (r"does not begin with width&height", lambda f: (f / "stereo/depth_maps/view_001.png.geometric.bin").write_bytes(b"x" * 99)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "damage"), COLMAP_TEXT, ids=[message for message, _ in COLMAP_TEXT])
def test_colmap(scene, tmp_path, refused, message, damage):
    write_colmap(scene, tmp_path / "clip", binary=False)
    damage(tmp_path / "clip")
    refused(message, "colmap", tmp_path / "clip", tmp_path / "raw")


@pytest.mark.parametrize("name", ["cameras", "images"])
@pytest.mark.parametrize("left", [0, 7, 30, -1])
def test_binary_models_that_are_cut_short(scene, tmp_path, refused, name, left):
    write_colmap(scene, tmp_path / "clip")
    path = tmp_path / "clip" / "sparse" / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:left])
    refused(rf"{name}\.bin ends after \d+ bytes .* cut short", "colmap", tmp_path / "clip", tmp_path / "raw")


@pytest.mark.parametrize("binary", [True, False])
def test_distorted_cameras_are_sent_to_the_undistorter(scene, tmp_path, refused, binary):
    write_colmap(scene, tmp_path / "clip", binary=binary, model="OPENCV")
    refused("OPENCV has lens distortion.*colmap image_undistorter", "colmap", tmp_path / "clip", tmp_path / "raw")


def test_a_part_without_gaps_can_be_taken(scene, tmp_path):
    write_colmap(scene, tmp_path / "clip", binary=False)
    in_image_rows(tmp_path / "clip/sparse/images.txt", lambda pairs: [p for p in pairs if "view_003" not in p[0]])
    cut = ["--start", 4, "--frames", 5]
    assert convert("colmap", tmp_path / "clip", tmp_path / "raw", *cut) == 0
    assert entries(tmp_path / "raw")[0]["frames"] == 5


def document(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def frame_matrix(change):
    """Changes the matrix of the frame that is listed third, frame_00007."""

    def apply(values):
        matrix = np.array(values["frames"][2]["transform_matrix"])
        values["frames"][2]["transform_matrix"] = np.asarray(change(matrix)).tolist()

    return apply


NERFSTUDIO = [
    (r"no list `frames`", lambda v: v.pop("frames")),
    (r"a frame has no file_path", lambda v: v["frames"][0].pop("file_path")),
    (r"lens distortion \{'k1': 0\.1\}.*image_undistorter", lambda v: v.update(k1=0.1)),
    (r"lens distortion \{'p2': -0\.2\}", lambda v: v["frames"][4].update(p2=-0.2)),
    (r"camera model OPENCV_FISHEYE", lambda v: v.update(camera_model="OPENCV_FISHEYE")),
    (r"neither fl_x nor camera_angle_x", lambda v: v.pop("fl_x")),
    (r"cx is 'middle', not a number", lambda v: v.update(cx="middle")),
    (r"images of 64x192 .* they are 64x96", lambda v: v.update(w=192)),
    (r"frame_00007\.png: its transform_matrix is no 4x4", lambda v: v["frames"][2].update(transform_matrix=[1, 2])),
    (r"frame_00007\.png: the last row .* is it transposed\?", frame_matrix(lambda m: m.T)),
    (r"frame_00007\.png: .* no rotation \(determinant -1\.0", frame_matrix(lambda m: m * [-1, 1, 1, 1])),
    (r"frame_00007\.png: .* no rotation \(determinant 8\.0", frame_matrix(lambda m: m * [2, 2, 2, 1])),
    (r"frame 8 \(gone\.png\) cannot be used: no .*images/gone\.png", lambda v: v["frames"][2].update(file_path="images/gone.png")),
    (r"frame 6 .* has no depth_file_path for it", lambda v: v["frames"][2].pop("depth_file_path")),
    (r"frame 6 .*: no .*depth/gone\.png", lambda v: v["frames"][2].update(depth_file_path="depth/gone.png")),
    (r"format rgb24; depth images have one channel of 16 bits",
     lambda v: v["frames"][2].update(depth_file_path="images/frame_00007.png")),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), NERFSTUDIO, ids=[message for message, _ in NERFSTUDIO])
def test_nerfstudio(scene, tmp_path, refused, message, change):
    write_nerfstudio(scene, tmp_path / "clip")
    document(tmp_path / "clip" / "transforms.json", change)
    refused(message, "nerfstudio", tmp_path / "clip", tmp_path / "raw")


def test_intrinsics_of_each_frame_and_angles_are_read(scene, tmp_path):
    """As Blender scenes have them: an angle, names without suffix, a principal point in the middle."""
    write_nerfstudio(scene, tmp_path / "clip", depth="none")

    def change(values):
        for name in ("fl_x", "fl_y", "cx", "cy", "w", "h", "camera_model"):
            del values[name]
        values["camera_angle_x"] = 2 * np.arctan(WIDTH / 2 / scene.focal_px)
        for frame in values["frames"]:
            frame["file_path"] = frame["file_path"].removesuffix(".png")
        values["frames"][-1] |= {"fl_x": 2 * scene.focal_px, "cx": 40}

    document(tmp_path / "clip" / "transforms.json", change)
    assert convert("nerfstudio", tmp_path / "clip", tmp_path / "raw") == 0
    rows = np.loadtxt(tmp_path / "raw" / "camera_params" / "clip.txt")
    f = scene.focal_px
    np.testing.assert_allclose(rows[1:, 1:5], [[f / WIDTH, f / HEIGHT, 0.5, 0.5]] * (FRAMES - 1))
    np.testing.assert_allclose(rows[0, 1:5], [2 * f / WIDTH, 2 * f / HEIGHT, 40 / WIDTH, 0.5])


RE10K = [
    (r"no frames for .*clip\.txt: there is no .*clip.* or .*abcdefghijk", lambda c, p: (p / "clip").rename(p / "other")),
    (r"frame 2 \(77125000\.png\) cannot be used: .*no such image; .*--start 3 --frames 5",
     lambda c, p: (p / "clip/77125000.png").unlink()),
    (r"no image in .* is named by a timestamp .* such as 77000000\.png",
     lambda c, p: [path.rename(path.with_stem(path.stem + "0")) for path in list((p / "clip").iterdir())]),
    (r"timestamps do not rise", lambda c, p: edit(c, b"77062500 ", b"77000000 ")),
    (r"clip\.txt, line 2: 18 values", lambda c, p: edit(c, b"77000000 ", b"")),
    (r"rows of 12 values carry no intrinsics", lambda c, p: c.write_text("1 0 0 0 0 1 0 0 0 0 1 0\n" * FRAMES)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "damage"), RE10K, ids=[message for message, _ in RE10K])
def test_re10k(scene, tmp_path, refused, message, damage):
    write_re10k(scene, tmp_path / "cameras", tmp_path / "frames")
    damage(tmp_path / "cameras" / "clip.txt", tmp_path / "frames")
    refused(message, "re10k", tmp_path / "cameras", tmp_path / "raw", "--pictures", tmp_path / "frames")


def test_a_video_that_is_not_the_clips(scene, tmp_path, refused):
    write_re10k(scene, tmp_path / "cameras", tmp_path / "frames")
    (tmp_path / "frames" / "clip").rename(tmp_path / "unused")
    with video_writer(tmp_path / "frames" / "clip.mp4", 16, HEIGHT, WIDTH) as add:
        for picture in (*scene.pictures, *scene.pictures):
            add(np.ascontiguousarray(picture))
    command = ["re10k", tmp_path / "cameras", tmp_path / "raw", "--pictures", tmp_path / "frames"]
    refused(r"clip\.mp4 has 18 frames over 1\.06 s, .* 9 rows from 77\.00 to 77\.50 s", *command)


LABELS = [
    ("vggt", r"has no extrinsic or extrinsics \(cameras\); it has depth", lambda a: a.pop("extrinsic")),
    ("vggt", r"has no world_points or pts3d", lambda a: [a.pop("depth"), a.pop("world_points")]),
    ("vggt", r"intrinsic is \[8, 3, 3\], \[9, 3, 3\] is needed; the clip has 9 frames",
     lambda a: a.update(intrinsic=a["intrinsic"][1:])),
    ("vggt", r"an array is \[8, 64, 96\], \[9, any, any\]", lambda a: a.update(depth=a["depth"][1:])),
    ("vggt", r"intrinsics .* are not pixels of the network's 64x96",
     lambda a: a.update(intrinsic=a["intrinsic"] * [[9], [9], [1]])),
    ("vggt", r"0003\.png: .* no rotation \(determinant -1",
     lambda a: a["extrinsic"].__setitem__(3, -a["extrinsic"][3])),
    ("vggt", r"0002\.png: .* no rotation", lambda a: a["extrinsic"].__setitem__(2, np.nan)),
    ("vggt", r"clip\.npz, depth holds pickled objects, which are not read", lambda a: a.update(depth=np.array([None]))),
    ("dust3r", r"has no im_poses or poses", lambda a: a.pop("im_poses")),
    ("dust3r", r"has no focals", lambda a: a.pop("focals")),
    ("dust3r", r"focals \[9, 3\] are not one or two", lambda a: a.update(focals=np.ones((9, 3)))),
    ("dust3r", r"the last row .* is it transposed",
     lambda a: a.update(im_poses=a["im_poses"].transpose(0, 2, 1))),
    ("dust3r", r"principal_points is \[9, 3\]", lambda a: a.update(principal_points=np.ones((9, 3)))),
]  # fmt: skip


@pytest.mark.parametrize(("tool", "message", "change"), LABELS, ids=[message for _, message, _ in LABELS])
def test_predictions(scene, tmp_path, refused, tool, message, change):
    arrays = {"vggt": vggt_arrays, "dust3r": dust3r_arrays}[tool](scene)
    change(arrays)
    np.savez(tmp_path / "clip.npz", **arrays)
    video = write_frames(scene, tmp_path / "frames")
    refused(message, tool, tmp_path / "clip.npz", tmp_path / "raw", "--video", video)


def test_files_that_are_no_predictions(scene, tmp_path, refused):
    video = write_frames(scene, tmp_path / "frames")
    np.savez(tmp_path / "clip.npz", **vggt_arrays(scene))
    whole = (tmp_path / "clip.npz").read_bytes()
    (tmp_path / "clip.npz").write_bytes(whole[: len(whole) // 2])
    refused(r"is no npz file, or is cut short", "vggt", tmp_path / "clip.npz", tmp_path / "raw", "--video", video)
    refused(r"no frames for .*give --video", "vggt", tmp_path / "clip.npz", tmp_path / "raw")
    refused(r"no .*/nothing", "vggt", tmp_path / "nothing", tmp_path / "raw")
    refused(r"holds no npz or npy files", "vggt", video, tmp_path / "raw")


def npy_header(shape, numbers="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": numbers, "fortran_order": False, "shape": shape})
    return file.getvalue()


def with_depth(path, arrays, data, zeros=0):
    """An npz file whose depth is `data` and so many zeros behind it."""
    np.savez(path, **{name: array for name, array in arrays.items() if name != "depth"})
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("depth.npy", "w") as file,
    ):
        file.write(data)
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))


def test_headers_that_declare_more_than_the_file_has(scene, tmp_path, refused):
    video, raw = write_frames(scene, tmp_path / "frames"), tmp_path / "raw"
    message = r"declares 24188682240000 bytes of float32 \[9, 819200, 820200\] and has 64"
    huge = npy_header((FRAMES, 819200, 820200)) + bytes(64)
    with_depth(tmp_path / "clip.npz", vggt_arrays(scene), huge)
    refused(r"clip\.npz, depth " + message, "vggt", tmp_path / "clip.npz", raw, "--video", video)
    arrays = tmp_path / "clip"
    arrays.mkdir()
    for name, array in vggt_arrays(scene).items():
        np.save(arrays / f"{name}.npy", array)
    (arrays / "depth.npy").write_bytes(huge)
    refused(r"depth\.npy " + message, "vggt", arrays, raw, "--video", video)


def test_arrays_with_damaged_bytes(scene, tmp_path, refused):
    video = write_frames(scene, tmp_path / "frames")
    np.savez(tmp_path / "clip.npz", **vggt_arrays(scene))
    numbers = vggt_arrays(scene)["depth"].tobytes()[:64]
    edit(tmp_path / "clip.npz", numbers, bytes(64))
    refused(r"clip\.npz, depth is damaged, .*CRC", "vggt", tmp_path / "clip.npz", tmp_path / "raw", "--video", video)


def test_arrays_that_would_unpack_to_more_than_the_clip_can_have(scene, tmp_path, refused):
    video = write_frames(scene, tmp_path / "frames")
    shape = (FRAMES, 1 << 12, 1 << 12)
    with_depth(tmp_path / "clip.npz", vggt_arrays(scene), npy_header(shape, "|u1"), math.prod(shape))
    assert (tmp_path / "clip.npz").stat().st_size < 2e6
    tracemalloc.start()
    refused(
        r"clip\.npz, depth declares \[9, 4096, 4096\] uint8: more than x, y and z of 4194304 pixels in 9 frames",
        *("vggt", tmp_path / "clip.npz", tmp_path / "raw", "--video", video),
    )
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50e6


def test_depth_for_clips_that_are_not_there_or_have_other_frames(scene, tmp_path, caplog):
    np.save(tmp_path / "clip.npy", scene.depth[1:])
    raw = tmp_path / "raw"
    assert convert("depth-anything", tmp_path / "clip.npy", raw, "--depth-kind", "metric") == 1
    assert re.search(r"raw has no clip clip; convert its video and cameras first .*raw/videos/ID\.mp4", caplog.text)
    write_colmap(scene, tmp_path / "clip", depth=False)
    assert convert("colmap", tmp_path / "clip", raw) == 0
    assert convert("depth-anything", tmp_path / "clip.npy", raw, "--depth-kind", "metric") == 1
    assert re.search(r"\[8, 64, 96\], \[9, any, any\] is needed", caplog.text)
    np.save(tmp_path / "clip.npy", np.array([None] * FRAMES), allow_pickle=True)
    assert convert("depth-anything", tmp_path / "clip.npy", raw, "--depth-kind", "metric") == 1
    assert "pickled objects, which are not read" in caplog.text
    assert not (raw / "depth").exists()


def test_one_id_for_several_clips_and_ids_that_cannot_be(scene, tmp_path, refused):
    for clip in ("a", "b.c"):
        write_colmap(scene, tmp_path / "scenes" / clip)
    refused(r"--id x names one clip, .* has 2", "colmap", tmp_path / "scenes", tmp_path / "raw", "--id", "x")
    refused(r"'b\.c' cannot be an id", "colmap", tmp_path / "scenes" / "b.c", tmp_path / "raw")
    assert convert("colmap", tmp_path / "scenes" / "b.c", tmp_path / "raw", "--id", "x") == 0
    assert [entry["id"] for entry in entries(tmp_path / "raw")] == ["x"]


@pytest.mark.parametrize("option", [["--size", "30x32"], ["--size", "32"], ["--frames", "6"]])
def test_sizes_and_lengths_that_the_network_cannot_take_are_wrong_usage(tmp_path, option):
    with pytest.raises(SystemExit) as stopped:
        convert("colmap", tmp_path, tmp_path / "raw", *option)
    assert stopped.value.code == 2


def test_negative_numbers_are_refused(tmp_path, refused):
    refused("--stride 0", "colmap", tmp_path, tmp_path / "raw", "--stride", "0")
    assert main(["data", "convert", "colmap", str(tmp_path), str(tmp_path / "raw")]) == 1  # no scene in there
