import io
import os
import pickle

import av
import numpy as np
import pytest
import torch
from raw_clips import write_video

from fw_train.data import schema
from fw_train.data.schema import Bucket, LabelInfo, SampleInfo
from fw_train.data.strict_json import SchemaError, read_json
from fw_train.geometry import Cameras

ENTRY = {"id": "a", "caption": "text", "fps": 16, "width": 48, "height": 32, "depth_kind": "metric"}
LABEL = LabelInfo("geo1", "default", 4e-4, 100, 10, 0, 1.0)
INFO = SampleInfo(1, "a", "caf\u00e9", 16.0, 32, 48, 5, 5, "metric", 2.5, "", LABEL, LABEL)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def test_an_entry_of_the_metadata():
    clip = schema.read_clip({**ENTRY, "intrinsics": [1, 1.5, 0.5, 0.5], "note": "left aside"}, "entry 0")
    assert (clip.id, clip.fps, clip.depth_kind, clip.frames, clip.original_size) == ("a", 16.0, "metric", None, None)
    assert clip.intrinsics == (1.0, 1.5, 0.5, 0.5)
    assert isinstance(clip.fps, float)
    sized = schema.read_clip({**ENTRY, "original_width": 1280, "original_height": 720}, "entry 0")
    assert sized.original_size == (720, 1280)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "an object is needed"),
        ({"id": "a"}, "no caption and no fps"),
        ({**ENTRY, "id": "x" * 81}, "cannot name tar members"),
        ({**ENTRY, "id": "a/b"}, "cannot name tar members"),
        ({**ENTRY, "id": "a\n"}, "cannot name tar members"),
        ({**ENTRY, "fps": "16"}, "fps: a number is needed, not '16'"),
        ({**ENTRY, "fps": 10**400}, "out of range"),
        ({**ENTRY, "width": 48.0}, "a whole number is needed"),
        ({**ENTRY, "height": False}, "a whole number is needed"),
        ({**ENTRY, "intrinsics": "1111"}, "a list of numbers is needed"),
        ({**ENTRY, "intrinsics": [1, 1, 1, True]}, "a number is needed"),
        ({**ENTRY, "caption": "\ud800"}, "is no text"),
        ({**ENTRY, "original_width": 0, "original_height": 720}, "give both"),
    ],
)
def test_entries_that_are_refused(entry, message):
    with pytest.raises(SchemaError, match=message):
        schema.read_clip(entry, "entry 0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('[{"a": NaN}]', "NaN is not JSON"),
        ("[1, -Infinity]", "-Infinity is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1,", "is not JSON"),
        (b"\xff\xfe\xfd", "is not JSON"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(SchemaError, match=message):
        read_json(text, "file")


def test_buckets():
    assert str(Bucket(336, 592, 81)) == "336x592x81"
    assert Bucket.parse("336x592x81") == Bucket(336, 592, 81)
    Bucket(336, 592, 81).check()
    for text in ("336x592", "0x16x1", "16x16x1x1", "../16x16x1", "16x16x1\n"):
        with pytest.raises(SchemaError, match="no bucket"):
            Bucket.parse(text)
    with pytest.raises(SchemaError, match="40x100 .* multiples of 16; .* to 32x96"):
        Bucket(40, 100, 81).check()
    with pytest.raises(SchemaError, match="80 frames are not 4k \\+ 1.*use 81.*--frames"):
        Bucket(336, 592, 80).check()


def test_facts_of_a_sample_come_back():
    data = schema.info_bytes(INFO)
    assert schema.parse_info(data, "json") == INFO
    assert data == schema.info_bytes(schema.parse_info(data, "json"))
    assert "caf\u00e9".encode() in data


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"schema": 1', b'"schema": 2', "schema 2 is unknown to this reader, which knows 1"),
        (b'"schema": 1', b'"schema": true', "out of range|unknown|whole number"),
        (b'"key": "a", ', b"", "no key"),
        (b'"key": "a"', b'"key": "a", "more": 1', "an unknown 'more'"),
        (b'"key": "a"', b'"key": "../a"', "out of range"),
        (b'"scene_scale": 2.5', b'"scene_scale": 0', "out of range"),
        (b'"scene_scale": 2.5', b'"scene_scale": 1e999', "out of range"),
        (b'"video_frames": 5', b'"video_frames": 4', "out of range"),
        (b'"codec": "geo1"', b'"codec": null', "depth, codec: a string is needed"),
        (b'"preset": "default"', b'"preset": "best"', "'best' is not one of default, tight, lossless"),
    ],
)
def test_facts_that_are_refused(old, new, message):
    data = schema.info_bytes(INFO).replace(old, new, 1)
    assert data != schema.info_bytes(INFO)
    with pytest.raises(SchemaError, match=message):
        schema.parse_info(data, "json")


def test_cameras_are_sixteen_numbers_a_frame():
    pose = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    pose[1, :3] = torch.tensor([[0.0, -1, 0, 0.25], [1, 0, 0, 0.5], [0, 0, 1, 0.75]])
    intrinsics = torch.tensor([[0.9, 1.6, 0.5, 0.5], [0.8, 1.4, 0.4, 0.6]], dtype=torch.float64)
    data = schema.camera_bytes(Cameras(pose, intrinsics))
    table = np.load(io.BytesIO(data), allow_pickle=False)
    assert table.dtype == np.float64
    assert table[1].tolist() == [0, -1, 0, 0.25, 1, 0, 0, 0.5, 0, 0, 1, 0.75, 0.8, 1.4, 0.4, 0.6]
    back = schema.parse_cameras(data, 2, "camera.npy")
    assert torch.equal(back.cam_from_world, pose)
    assert torch.equal(back.intrinsics_frac, intrinsics)
    for wrong in (npy(table[:1]), npy(table.astype("f4")), npy(table + np.inf)):
        with pytest.raises(SchemaError, match="finite float64"):
            schema.parse_cameras(wrong, 2, "camera.npy")


def test_npy_arrays():
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.float32(3)):
        assert np.array_equal(schema.parse_npy(npy(array), "x"), array)
    assert schema.parse_npy(npy(np.empty((0, 3))), "x").shape == (0, 3)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(Trap()), "is no npy file"),
        (npy(np.array([Trap()]), allow_pickle=True), "pickled objects"),
        (npy(np.zeros(4))[:-1], "declares 32 bytes .* and has 31"),
        (npy(np.zeros(4)) + b"x", "declares 32 bytes .* and has 33"),
        (
            header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n"),
            "declares 4000000000000 bytes",
        ),
        (header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}\n"), "declares"),
        (header(b"__import__('os').mkdir('trapped')\n"), "is no npy file"),
        (b"\x93NUMPY\x09\x00", "version \\(9, 0\\)|is no npy file"),
        (b"", "is no npy file"),
    ],
)
def test_npy_files_that_are_refused(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SchemaError, match=message):
        schema.parse_npy(data, "x")
    assert list(tmp_path.iterdir()) == []


def test_labels_are_read_as_float32(tmp_path):
    for t, dtype in enumerate(("f2", "f4", "f8")):
        np.save(tmp_path / f"frame_{t:04}.npy", np.full((2, 3), 0.5 + t, dtype))
    np.save(tmp_path / "frame_0003.npy", np.full((2, 3), 1e300))
    assert schema.count_frames(tmp_path) == 4
    labels = schema.read_labels(tmp_path, 4, (2, 3))
    assert labels.dtype == np.float32
    assert labels[:, 0, 0].tolist() == [0.5, 1.5, 2.5, np.inf]
    (tmp_path / "frame_0001.npy").unlink()
    with pytest.raises(SchemaError, match="has no frame_0001.npy but has later frames"):
        schema.count_frames(tmp_path)


def test_a_video_is_decoded_to_its_end(tmp_path):
    write_video(tmp_path / "v.mp4", 9, 32, 48, bf="3", g="5")
    data = (tmp_path / "v.mp4").read_bytes()
    assert schema.video_facts(data, "v", 9) == (9, 32, 48)
    assert schema.video_facts(data, "v", 100) == (9, 32, 48)
    assert schema.video_facts(data, "v", 4).frames == 5
    for damaged in (data[: len(data) // 2], data[:-900], b"", b"#EXTM3U\nfile:///etc/passwd\n"):
        with pytest.raises(SchemaError, match="v cannot be decoded after"):
            schema.video_facts(damaged, "v", 9)


def test_a_turned_video_has_the_size_that_is_displayed(tmp_path):
    write_video(tmp_path / "v.mp4", 3, 32, 48)
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    unit, quarter = bytes([0, 1, 0, 0]), bytes([255, 255, 0, 0])
    zero, last = bytes(4), bytes([64, 0, 0, 0])
    at = data.index(unit + zero * 3 + unit + zero * 3 + last, data.index(b"tkhd"))
    data[at : at + 36] = zero + unit + zero + quarter + zero * 4 + last
    with av.open(io.BytesIO(bytes(data))) as container:
        assert abs(next(container.decode(video=0)).rotation) == 90
    assert schema.video_facts(bytes(data), "v", 3) == (3, 48, 32)


def test_suffixes_fit_a_plain_tar_header():
    assert list(schema.SUFFIXES) == sorted(schema.SUFFIXES)
    assert max(len(suffix) for suffix in schema.SUFFIXES + schema.SIDECAR_SUFFIXES) + 1 + schema.KEY_LENGTH <= 100
