"""Camera text files: 19 values a row (RealEstate10K) or 12, one row a frame, world to camera.

    19: frame-or-timestamp fx fy cx cy k1 k2, then the row-major 3x4 of cam_from_world; intrinsics as fractions
    12: the row-major 3x4 alone; intrinsics come from the metadata

One leading line that is a URL is skipped. Rows belong to frames by their order, whatever their first number says.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fw_train.atomic_files import write_file
from fw_train.geometry import Cameras, rigid

FULL, POSE_ONLY = 19, 12
ROTATION_TOLERANCE = 2e-3  # three decimals are off by this much
ROUNDED = 1e-12  # from orthonormal; fp64 rotations written with all digits are closer
MAX_BYTES = 64 << 20


class CameraFileError(ValueError):
    """A camera file that cannot be used; the message names file, line and remedy."""


def read_cameras(
    path: str | Path, frames: int | None = None, intrinsics_frac: Sequence[float] | None = None
) -> Cameras:
    """The cameras of a file, which must have `frames` rows where that is given; 12-value rows need `intrinsics_frac`."""
    path = Path(path)
    if not path.is_file():
        raise CameraFileError(f"no camera file {path}; give one row per frame, or leave the clip out")
    if path.stat().st_size > MAX_BYTES:
        raise CameraFileError(f"{path} has {path.stat().st_size} bytes; a camera file has one short row a frame")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CameraFileError(f"{path} is not a text file; cameras are rows of {FULL} or {POSE_ONLY} numbers") from None
    return parse_cameras_text(text, path, frames, intrinsics_frac)


def parse_cameras_text(
    text: str, where: str | Path, frames: int | None = None, intrinsics_frac: Sequence[float] | None = None
) -> Cameras:
    """The cameras of a camera file's text; `where` names it in errors."""
    numbered = [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if numbered and len(numbered[0][1]) == 1 and "://" in numbered[0][1][0]:
        numbered = numbered[1:]
    if not numbered:
        raise CameraFileError(f"{where} has no rows; it needs one of {FULL} or {POSE_ONLY} numbers for every frame")
    rows = [_row(where, number, words) for number, words in numbered]
    width = len(rows[0])
    for (number, words), row in zip(numbered, rows, strict=True):
        if len(row) != width:
            raise CameraFileError(
                f"{where}, line {number}: {len(words)} values where line {numbered[0][0]} has {width}; all rows have one format"
            )
    if frames is not None and len(numbered) != frames:
        raise CameraFileError(
            f"{where}, line {numbered[-1][0]}: {len(numbered)} rows for {frames} frames; rows and frames are matched by order, "
            "so every frame needs exactly one"
        )
    table = torch.tensor(rows, dtype=torch.float64)
    cam_from_world = _poses(where, [number for number, _ in numbered], table[:, -POSE_ONLY:].unflatten(1, (3, 4)))
    return Cameras(cam_from_world, _intrinsics(where, numbered[0][0], table, intrinsics_frac))


def write_cameras(path: str | Path, cameras: Cameras) -> None:
    """Writes 19-value rows with all digits, in one step: the file is complete or absent."""
    path = Path(path)
    rows = []
    for index, (pose, intrinsics) in enumerate(zip(cameras.cam_from_world, cameras.intrinsics_frac, strict=True)):
        values = [*intrinsics.tolist(), 0.0, 0.0, *pose[:3].flatten().tolist()]
        rows.append(" ".join([str(index), *(f"{value:.17g}" for value in values)]))
    write_file(path, ("\n".join(rows) + "\n").encode())


def _row(where: str | Path, number: int, words: list[str]) -> list[float]:
    if len(words) not in (FULL, POSE_ONLY):
        raise CameraFileError(
            f"{where}, line {number}: {len(words)} values; a row has {FULL} (frame fx fy cx cy k1 k2 and the 3x4 "
            f"world-to-camera matrix) or {POSE_ONLY} (the matrix alone)"
        )
    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise CameraFileError(f"{where}, line {number}: {error}; all values are plain numbers") from None
    if not all(map(math.isfinite, values)):
        raise CameraFileError(
            f"{where}, line {number}: a value is not finite; leave the clip out or estimate its cameras again"
        )
    if len(values) == FULL and (values[5] or values[6]):
        raise CameraFileError(
            f"{where}, line {number}: lens distortion k1={values[5]:g}, k2={values[6]:g}; cameras are pinholes here, so undistort "
            "the frames first and write zeros"
        )
    return values


def _poses(where: str | Path, numbers: list[int], matrices: Tensor) -> Tensor:
    rotation = matrices[..., :3]
    off = (rotation @ rotation.transpose(-1, -2) - torch.eye(3, dtype=rotation.dtype)).abs().amax(dim=(-1, -2))
    wrong = (off > ROTATION_TOLERANCE) | (torch.linalg.det(rotation) < 0)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise CameraFileError(
            f"{where}, line {numbers[index]}: the 3x3 part is no rotation (determinant {torch.linalg.det(rotation[index]):.4f}, "
            f"{off[index]:.1e} from orthonormal); the 3x4 is row-major with the translation as last column"
        )
    # Rounded digits become the nearest rotation, so that the first camera's relative pose is the identity; exact ones stay.
    u, _, vt = torch.linalg.svd(rotation)
    rounded = (off > ROUNDED)[:, None, None]
    return rigid(torch.where(rounded, u @ vt, rotation), matrices[..., 3])


def _intrinsics(where: str | Path, number: int, table: Tensor, given: Sequence[float] | None) -> Tensor:
    if table.shape[1] == POSE_ONLY:
        if given is None:
            raise CameraFileError(
                f"{where}, line {number}: rows of {POSE_ONLY} values carry no intrinsics; give `intrinsics` [fx, fy, cx, cy] as "
                "fractions of width and height in the metadata"
            )
        table = torch.tensor(given, dtype=torch.float64).expand(len(table), -1)
        if table.shape[1] != 4:
            raise CameraFileError(f"{where}: intrinsics are four numbers [fx, fy, cx, cy], got {list(given)}")
        intrinsics = table
    else:
        intrinsics = table[:, 1:5]
    if (intrinsics[:, :2] <= 0).any() or (intrinsics > 20).any():
        worst = intrinsics[int((intrinsics.abs().amax(1)).argmax())].tolist()
        raise CameraFileError(
            f"{where}, line {number}: intrinsics {worst} are not fractions of width and height; divide fx and cx by the width, "
            "fy and cy by the height, in pixels"
        )
    return intrinsics.clone()
