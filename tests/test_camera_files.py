from pathlib import Path

import numpy as np
import pytest
import torch

from fw_train.camera_files import CameraFileError, read_cameras, write_cameras
from fw_train.geometry import Cameras, relative_to_first, rigid

FIXTURE = np.load(Path(__file__).parent / "fixtures/cameras_re10k.npz")
IDENTITY = "1 0 0 0 0 1 0 0 0 0 1 0"
ROW = f"0 0.9 1.6 0.5 0.5 0 0 {IDENTITY}"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "clip.txt"
        path.write_text(text)
        return path

    return write


def test_realestate10k_rows_are_read_in_their_order(write):
    rows = FIXTURE["rows"]
    cameras = read_cameras(write("\n".join(" ".join(map(repr, map(float, row))) for row in rows)), frames=9)
    assert cameras.cam_from_world.dtype == torch.float64
    np.testing.assert_array_equal(cameras.cam_from_world[:, :3].numpy(), rows[:, 7:].reshape(9, 3, 4))
    np.testing.assert_array_equal(cameras.intrinsics_frac.numpy(), rows[:, 1:5])
    assert cameras.cam_from_world[:, 3].unique(dim=0).tolist() == [[0, 0, 0, 1]]


def test_a_url_line_and_timestamps_are_skipped(write):
    cameras = read_cameras(
        write(f"https://example.org/watch?v=1\n52553000 {ROW[2:]}\n\n52586000 {ROW[2:]}\n"), frames=2
    )
    assert len(cameras.cam_from_world) == 2


def test_twelve_values_take_the_intrinsics_of_the_metadata(write):
    cameras = read_cameras(write(f"{IDENTITY}\n{IDENTITY}\n"), frames=2, intrinsics_frac=[0.9, 1.6, 0.5, 0.5])
    assert cameras.intrinsics_frac.tolist() == [[0.9, 1.6, 0.5, 0.5]] * 2


def test_the_translation_is_the_last_column_not_the_last_three_numbers(write):
    cameras = read_cameras(write("0 .9 1.6 .5 .5 0 0  1 0 0 7  0 1 0 8  0 0 1 9"))
    assert cameras.cam_from_world[0, :3, 3].tolist() == [7, 8, 9]


def test_rotations_of_few_digits_become_rotations(write):
    rows = FIXTURE["rows"]
    text = "\n".join(" ".join(f"{value:.4f}" for value in row) for row in rows)
    cameras = read_cameras(write("\ufeff" + text), frames=9)  # with the mark that some editors put in front
    np.testing.assert_allclose(cameras.cam_from_world[:, :3].numpy(), rows[:, 7:].reshape(9, 3, 4), atol=1e-4)
    first = relative_to_first(cameras.cam_from_world)[0]
    torch.testing.assert_close(first, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROW.rsplit(" ", 1)[0], r"clip\.txt, line 1: 18 values; a row has 19 .* or 12"),
        (f"{ROW}\n{ROW} 1", r"line 2: 20 values"),
        (f"{ROW}\n{IDENTITY}", r"line 2: 12 values where line 1 has 19"),
        (f"{ROW}\n{ROW}", r"line 2: 2 rows for 3 frames"),
        (f"{ROW}\n{ROW}\n{ROW}\n{ROW}", r"4 rows for 3 frames"),
        (f"{ROW}\n{ROW}\n{ROW.replace('0.9', 'wide')}", r"line 3: could not convert string to float: 'wide'"),
        (f"{ROW}\n{ROW}\n{ROW.replace('0.9', 'nan')}", r"line 3: a value is not finite"),
        (f"{ROW}\n{ROW}\n{ROW.replace('0.5 0 0', '0.5 0.1 0')}", r"line 3: lens distortion k1=0\.1"),
        (f"{ROW}\n{ROW}\n0 .9 1.6 .5 .5 0 0 2 0 0 0 0 1 0 0 0 0 1 0", r"line 3: the 3x3 part is no rotation"),
        (f"{ROW}\n{ROW}\n0 .9 1.6 .5 .5 0 0 -1 0 0 0 0 1 0 0 0 0 1 0", r"line 3: .* no rotation \(determinant -1"),
        ("\n".join([ROW.replace("0.9 1.6", "600 620")] * 3), r"are not fractions of width and height"),
        ("\n".join([IDENTITY] * 3), r"rows of 12 values carry no intrinsics"),
        ("", r"has no rows"),
        ("https://example.org\n", r"has no rows"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(write, text, message):
    path = write(text)
    with pytest.raises(CameraFileError, match=message) as error:
        read_cameras(path, frames=3)
    assert str(path) in str(error.value)


def test_missing_and_binary_files_are_errors(tmp_path):
    with pytest.raises(CameraFileError, match="no camera file"):
        read_cameras(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CameraFileError, match="not a text file"):
        read_cameras(tmp_path / "binary.txt")


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)).Q
    rotation = rotation * torch.linalg.det(rotation).sign()[:, None, None]
    translation = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    cameras = Cameras(rigid(rotation, translation), torch.rand(5, 4, generator=generator, dtype=torch.float64) + 0.1)
    write_cameras(tmp_path / "out.txt", cameras)
    again = read_cameras(tmp_path / "out.txt", frames=5)
    assert torch.equal(again.cam_from_world, cameras.cam_from_world)
    assert torch.equal(again.intrinsics_frac, cameras.intrinsics_frac)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["out.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    broken = Cameras(torch.eye(4).expand(2, 4, 4), torch.rand(1, 4))
    with pytest.raises(ValueError, match="zip"):
        write_cameras(path, broken)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_cannot_end_leaves_nothing_behind(tmp_path):
    (tmp_path / "out.txt").mkdir()
    with pytest.raises(OSError, match=r"out\.txt"):
        write_cameras(tmp_path / "out.txt", Cameras(torch.eye(4).expand(2, 4, 4), torch.ones(2, 4)))
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
