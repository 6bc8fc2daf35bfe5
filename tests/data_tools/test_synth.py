import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from data_tools import synth
from data_tools.scene_render import render_colour
from data_tools.scenes import sample_scene, surfaces_at, views
from data_tools.shared_folder import only_writer
from fw_train.camera_files import read_cameras
from fw_train.geometry import intrinsics_px, invert_rigid, unproject

TINY = ["--frames", "5", "--size", "32x48", "--both-orientations", "--moving", "0.5", "--sky", "0.5", "--fps", "8"]


def parse(out, *arguments):
    parser = argparse.ArgumentParser()
    synth.add_arguments(parser)
    return parser.parse_args([str(out), *TINY, *map(str, arguments)])


def make(out, *arguments):
    return synth.run(parse(out, *arguments))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Eight scenes made by one process."""
    out = tmp_path_factory.mktemp("synth") / "raw"
    assert make(out, "--scenes", 8, "--workers", 1) == 0
    return out


def records(out):
    return json.loads((out / "metadata.json").read_text())


def labels(out, record):
    depth, points = (
        np.stack([np.load(out / kind / record["id"] / f"frame_{frame:04d}.npy") for frame in range(5)])
        for kind in ("depth", "points")
    )
    return depth, points


def test_the_folder_has_the_promised_files(raw):
    listed = records(raw)
    assert [record["id"] for record in listed] == [f"synth_0_{index:05d}" for index in range(8)]
    expected = {"metadata.json", "synth.json"}
    for record in listed:
        assert set(record) == {"id", "caption", "fps", "width", "height", "depth_kind", "intrinsics"}
        assert record["depth_kind"] == "metric"
        assert record["fps"] == 8
        expected |= {f"videos/{record['id']}.mp4", f"camera_params/{record['id']}.txt"}
        expected |= {
            f"{kind}/{record['id']}/frame_{frame:04d}.npy" for kind in ("depth", "points") for frame in range(5)
        }
    assert set(contents(raw)) == expected
    assert [(record["height"], record["width"]) for record in listed] == [(32, 48), (48, 32)] * 4


def test_depth_points_and_cameras_agree(raw):
    for record in records(raw):
        depth, points = labels(raw, record)
        height, width = record["height"], record["width"]
        assert depth.shape == (5, height, width)
        assert points.shape == (5, height, width, 3)
        assert depth.dtype == points.dtype == np.float32
        cameras = read_cameras(raw / "camera_params" / f"{record['id']}.txt", frames=5)
        np.testing.assert_array_equal(cameras.cam_from_world[0], torch.eye(4))
        assert cameras.intrinsics_frac.tolist() == [record["intrinsics"]] * 5
        lifted = unproject(
            torch.from_numpy(depth).double(),
            intrinsics_px(cameras.intrinsics_frac, height, width),
            invert_rigid(cameras.cam_from_world),
        )
        valid = np.isfinite(depth)
        assert (depth[valid] > 0).all()
        assert (np.isfinite(points).all(axis=-1) == valid).all()
        np.testing.assert_array_equal(np.isnan(points).any(axis=-1), ~valid)
        np.testing.assert_allclose(lifted.permute(0, 2, 3, 1).numpy()[valid], points[valid], atol=1e-4)
        np.testing.assert_array_equal(points[0, ..., 2][valid[0]], depth[0][valid[0]])


def test_the_command_chooses_paths_and_what_captions_say(tmp_path):
    assert make(tmp_path / "raw", "--scenes", 2, "--workers", 1, "--path", "pan", "--no-camera-words") == 0
    for index, record in enumerate(records(tmp_path / "raw")):
        assert sample_scene(0, index, 0.5, 0.5, ("pan",)).place in record["caption"]
        assert "the camera pans" not in record["caption"]
        cameras = read_cameras(tmp_path / "raw" / "camera_params" / f"{record['id']}.txt", frames=5)
        torch.testing.assert_close(cameras.cam_from_world[:, :3, 3], torch.zeros(5, 3).double())


def test_some_scenes_have_a_sky_without_depth_and_the_others_depth_everywhere(raw):
    open_sky = ["open sky" in record["caption"] for record in records(raw)]
    without = [np.isnan(labels(raw, record)[0]).any() for record in records(raw)]
    assert open_sky == without
    assert 0 < sum(without) < 8


def test_still_points_keep_their_place_in_the_first_camera(raw):
    """The floor of a later frame lies in the plane of the first frame's floor."""
    for index, record in enumerate(records(raw)):
        _, points = labels(raw, record)
        pose = views(sample_scene(0, index, 0.5, 0.5), 5, 8, 32, 48)[0].stage_from_cam
        bottom = points[:, -1].astype(float) @ pose[1, :3] + pose[1, 3]
        assert np.median(np.abs(bottom), axis=1).max() < 1e-4


def test_the_video_shows_the_pictures(raw):
    for index, record in enumerate(records(raw)[:4]):
        with av.open(str(raw / "videos" / f"{record['id']}.mp4")) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == 8
            decoded = list(container.decode(stream))
        assert [frame.time for frame in decoded] == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8, 4 / 8])
        scene = sample_scene(0, index, 0.5, 0.5)
        for number, view in enumerate(views(scene, 5, 8, record["height"], record["width"])):
            drawn = render_colour(surfaces_at(scene, number / 4, number / 8), scene.light, view)
            # Colour has half the resolution in H.264, so brightness is compared closely and colour on the whole.
            difference = decoded[number].to_ndarray(format="rgb24").astype(float) - drawn
            assert np.abs(difference @ (0.299, 0.587, 0.114)).mean() < 2.5
            assert np.abs(difference.mean(axis=(0, 1))).max() < 2


def test_any_number_of_workers_writes_the_same_bytes(raw, tmp_path):
    assert make(tmp_path / "raw", "--scenes", 8, "--workers", 2) == 0
    assert contents(tmp_path / "raw") == contents(raw)


def test_scenes_do_not_depend_on_how_many_there_are(raw, tmp_path):
    assert make(tmp_path / "raw", "--scenes", 2, "--workers", 1) == 0
    ours, theirs = contents(tmp_path / "raw"), contents(raw)
    assert all(theirs[name] == data for name, data in ours.items() if not name.endswith(".json"))
    assert records(tmp_path / "raw") == records(raw)[:2]


def test_a_killed_run_leaves_no_worker_and_goes_on_to_the_same_bytes(raw, tmp_path):
    out, script = tmp_path / "raw", tmp_path / "run.py"
    arguments = [str(out), *TINY, "--scenes", "8", "--workers", "2"]
    script.write_text(
        "import argparse\nfrom data_tools import synth\nif __name__ == '__main__':\n"
        "    parser = argparse.ArgumentParser()\n    synth.add_arguments(parser)\n"
        f"    synth.run(parser.parse_args({arguments!r}))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    while process.poll() is None and not list(out.glob("camera_params/*.txt")):
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "metadata.json").exists()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(running(child) for child in children):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.02)
    assert make(out, "--scenes", 8, "--workers", 1) == 0
    assert contents(out) == contents(raw)


def test_a_scene_that_lost_a_part_is_made_again_and_the_others_stay(raw, tmp_path):
    out = tmp_path / "raw"
    assert make(out, "--scenes", 8, "--workers", 1) == 0
    complete = out / "videos" / "synth_0_00001.mp4"
    untouched = complete.stat().st_mtime_ns
    (out / "camera_params" / "synth_0_00003.txt").unlink()
    (out / "depth" / "synth_0_00003" / "frame_0009.npy").write_bytes(b"left over")
    (out / ".unfinished" / "synth_0_00003" / "depth").mkdir(parents=True)
    (out / "metadata.json").unlink()
    (out / ".metadata.json.0123abcd.tmp").write_text("[")
    assert make(out, "--scenes", 8, "--workers", 1) == 0
    assert contents(out) == contents(raw)
    assert complete.stat().st_mtime_ns == untouched


def test_a_rerun_with_other_arguments_says_what_differs(raw):
    before = contents(raw)
    with pytest.raises(
        ValueError, match=r"begun with other arguments: scenes is 8 there and 9 here; seed is 0 .* 5 here"
    ):
        make(raw, "--scenes", 9, "--seed", 5)
    with pytest.raises(ValueError, match=r"sizes is \[\[32, 48\], \[48, 32\]\] there and .*\[16, 32\]"):
        make(raw, "--scenes", 8, "--size", "16x32")
    assert contents(raw) == before


def test_a_damaged_settings_file_is_named(tmp_path):
    (tmp_path / "synth.json").write_text('{"scenes": 8')
    with pytest.raises(ValueError, match=r"synth\.json is damaged .*remove .* and begin again"):
        make(tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"has files in it but no synth\.json; give a new folder"):
        make(tmp_path)
    assert contents(tmp_path) == {"mine.txt": b"keep"}


def test_two_writers_do_not_share_a_folder(raw):
    with (
        only_writer(raw, "held by the test"),
        pytest.raises(ValueError, match="another `fw data synth` writes to"),
    ):
        make(raw, "--scenes", 8)


@pytest.mark.parametrize("name", ["--scenes", "--frames", "--fps", "--workers", "--seed"])
def test_negative_numbers_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} -3: give at least [01]"):
        make(tmp_path / "raw", name, "-3")
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(("name", "value"), [("--moving", "1.5"), ("--sky", "-0.1"), ("--sky", "nan")])
def test_fractions_are_between_0_and_1(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name} {value} is a fraction"):
        make(tmp_path / "raw", f"{name}={value}")


@pytest.mark.parametrize("size", ["64", "64x", "-4x32", "33x48", "32x47", "0x64", "8x64"])
def test_sizes_that_video_cannot_have_are_wrong_usage(tmp_path, size, capsys):
    with pytest.raises(SystemExit) as stopped:
        make(tmp_path / "raw", f"--size={size}")
    assert stopped.value.code == 2
    assert size in capsys.readouterr().err


def test_one_frame_is_a_clip(tmp_path):
    assert make(tmp_path / "raw", "--scenes", 1, "--workers", 1, "--frames", 1) == 0
    assert len(read_cameras(tmp_path / "raw" / "camera_params" / "synth_0_00000.txt").cam_from_world) == 1


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "raw"
    assert make(out, "--scenes", 4, "--workers", 1) == 0
    for index in (1, 2, 3):
        (out / "camera_params" / f"synth_0_{index:05d}.txt").unlink()
    real = synth.write_scene

    def interrupted(out, settings, index):
        if index == 2:
            raise KeyboardInterrupt
        real(out, settings, index)

    monkeypatch.setattr(synth, "write_scene", interrupted)
    assert make(out, "--scenes", 4, "--workers", 1) == 130
    assert "stopped: 2 of 4 scenes; the same command goes on from there" in capsys.readouterr().err
    assert not (out / "metadata.json").exists()
