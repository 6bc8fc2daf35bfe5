"""RealEstate10K: a text file for each clip (a URL, then a row for each frame), and the clip's frames or its video.

Rows: timestamp in microseconds, fx fy cx cy as fractions of the original frame, two zeros, the row-major 3x4 of cam_from_world.
Downloaders leave a folder of images named by timestamp, the cut clip, or the whole video that several clips come from.
"""

import re
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_tools.convert_clip import Source
from data_tools.framing import fitted_region, region_intrinsics
from data_tools.pictures import VIDEO_SUFFIXES, Pictures, choose, image_files, open_images, open_video
from fw_train.camera_files import FULL, CameraFileError, parse_cameras_text
from fw_train.geometry import Cameras

_VIDEO_OF_URL = re.compile(r"(?:v=|youtu\.be/|/embed/)([A-Za-z0-9_-]{11})")


def read_re10k(path: Path, pictures_in: Path, original_size: tuple[int, int]) -> Source:
    """The clip of a camera file; its frames lie in `pictures_in`, named like the file or like the video of the URL."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CameraFileError(f"{path} is not a text file; RealEstate10K has one for each clip") from None
    cameras = parse_cameras_text(text, path)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    url = lines[0][0] if len(lines[0]) == 1 else ""
    rows = lines[1:] if url else lines
    if len(rows[0]) != FULL:
        raise CameraFileError(f"{path}: rows of {len(rows[0])} values; those of RealEstate10K have {FULL}")
    times_us = [round(float(row[0])) for row in rows]
    if any(later <= earlier for earlier, later in pairwise(times_us)):
        raise CameraFileError(f"{path}: its timestamps do not rise from row to row; sort the rows")

    video = _VIDEO_OF_URL.search(url)
    pictures, gaps = _pictures(path, pictures_in, [path.stem, *([video[1]] if video else [])], times_us)
    shape = pictures.height, pictures.width
    original = fitted_region(shape, original_size, "pad")
    fractions = region_intrinsics(cameras.intrinsics_frac, original, shape)
    return Source(
        pictures,
        Cameras(cameras.cam_from_world, fractions),
        gaps=gaps,
        inputs=(path,),
        origin=f"RealEstate10K {url}".strip(),
        fps=_rate(times_us),
    )


def _pictures(path: Path, pictures_in: Path, names: list[str], times_us: list[int]) -> tuple[Pictures, dict[int, str]]:
    """The frames of all timestamps, and which of them are missing."""
    tried = []
    for name in names:
        folder = pictures_in / name
        tried.append(f"{folder}{'{' + ','.join(('/', *VIDEO_SUFFIXES)) + '}'}")
        if folder.is_dir():
            return _images(folder, times_us)
        for suffix in VIDEO_SUFFIXES:
            file = pictures_in / f"{name}{suffix}"
            if file.is_file():
                return _of_video(open_video(file), times_us, file, path), {}
    raise ValueError(f"no frames for {path}: there is no {' or '.join(tried)}")


def _images(folder: Path, times_us: list[int]) -> tuple[Pictures, dict[int, str]]:
    files = image_files(folder)
    by_time = {int(file.stem): file for file in files if file.stem.isdecimal()}
    missing = [t for t, time in enumerate(times_us) if time not in by_time]
    if len(missing) == len(times_us):
        raise ValueError(
            f"no image in {folder} is named by a timestamp of its clip, such as {times_us[0]}.png ({len(files)} images there)"
        )
    present = open_images([by_time[time] for time in times_us if time in by_time], folder)
    files_of_all = tuple(by_time.get(time, folder / f"{time}.png") for time in times_us)
    names = tuple(file.name for file in files_of_all)
    return replace(present, files=files_of_all, names=names), dict.fromkeys(missing, f"{folder} has no such image")


def _of_video(pictures: Pictures, times_us: list[int], file: Path, path: Path) -> Pictures:
    """A video with as many frames as rows is the clip itself; a longer one is the whole, and timestamps count from its start."""
    found, rows = len(pictures.names), len(times_us)
    if found == rows:
        return pictures
    times = np.array(pictures.times_s)
    wanted = np.array(times_us) * 1e-6
    nearest = np.abs(times[:, None] - wanted).argmin(axis=0)
    apart_s = np.abs(times[nearest] - wanted).max()
    period_s = (times[-1] - times[0]) / max(found - 1, 1)
    if apart_s > 0.75 * period_s or len(set(nearest.tolist())) < rows:
        raise ValueError(
            f"{file} has {found} frames over {times[-1]:.2f} s, {path} has {rows} rows from {wanted[0]:.2f} to {wanted[-1]:.2f} s; "
            "give the clip with a frame for each row, or the whole video at its own frame rate"
        )
    return choose(pictures, nearest.tolist())


def _rate(times_us: list[int]) -> Fraction | None:
    """Frames a second, as broadcast has them (30000/1001)."""
    if len(times_us) < 2:
        return None
    period_us = float(np.median(np.diff(times_us)))
    rate = 1e6 / period_us
    return (
        min((Fraction(round(rate)), Fraction(round(rate) * 1000, 1001)), key=lambda fps: abs(float(fps) - rate))
        if rate > 1
        else Fraction(rate).limit_denominator(1000)
    )
