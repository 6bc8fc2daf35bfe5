"""The frames of a clip as people have them: a video file, or a folder with an image for each frame."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Pictures:
    """Frames that can be read; `names` tell them apart in errors."""

    files: tuple[Path, ...]  # one video, or an image for each frame
    names: tuple[str, ...]
    height: int
    width: int
    fps: Fraction | None = None  # of a video
    times_s: tuple[float, ...] = ()  # of a video
    of_video: tuple[int, ...] | None = None  # numbers of its frames; None: these are images


def natural_order(path: Path) -> tuple[tuple[int, str], ...]:
    """Sorts frame_2 before frame_10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts)


def image_files(folder: Path) -> list[Path]:
    """The images below a folder, in the order of their names."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; the frames lie there, one image each")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    return sorted(found, key=natural_order)


def open_pictures(path: Path) -> Pictures:
    """The frames of a video file or of a folder of images."""
    if path.is_dir():
        return open_images(image_files(path), path)
    if not path.is_file():
        raise ValueError(f"no video or folder of images {path}")
    return open_video(path)


def open_images(files: Sequence[Path], folder: Path) -> Pictures:
    """Image files as frames; their size is the first one's."""
    if not files:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    height, width = read_image(files[0]).shape[:2]
    return Pictures(tuple(files), tuple(path.name for path in files), height, width)


def open_video(path: Path) -> Pictures:
    """The frames of a video, counted by its packets, so without decoding it."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            first = next(container.decode(stream), None)
            if first is None:
                raise ValueError(f"{path} has no frames")
            if first.rotation:
                raise ValueError(
                    f"{path} is stored turned by {first.rotation} degrees; `ffmpeg -i {path.name} turned.mp4` turns its frames"
                )
            container.seek(0)
            ticks = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None and packet.size)
            rate, base = stream.average_rate or stream.guessed_rate, stream.time_base
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not ticks or base is None:
        raise ValueError(f"{path} has no timestamps; write it anew with `ffmpeg -i {path.name} new.mp4`")
    times = tuple(float((tick - ticks[0]) * base) for tick in ticks)
    names = tuple(f"frame {number} of {path.name}" for number in range(len(ticks)))
    return Pictures((path,), names, first.height, first.width, rate, times, tuple(range(len(ticks))))


def choose(pictures: Pictures, numbers: Sequence[int]) -> Pictures:
    """Some of the frames, in ascending order."""
    names = tuple(pictures.names[number] for number in numbers)
    if pictures.of_video is None:
        files = tuple(pictures.files[number] for number in numbers)
        return Pictures(files, names, pictures.height, pictures.width)
    of_video = tuple(pictures.of_video[number] for number in numbers)
    times = tuple(pictures.times_s[number] for number in numbers)
    return Pictures(pictures.files, names, pictures.height, pictures.width, pictures.fps, times, of_video)


def read_pictures(pictures: Pictures) -> Iterator[NDArray[np.uint8]]:
    """The frames [H, W, 3] one after the other, RGB."""
    size = pictures.height, pictures.width
    if pictures.of_video is not None:
        yield from _read_video(pictures.files[0], pictures.of_video, size)
        return
    for path in pictures.files:
        picture = read_image(path)
        if picture.shape[:2] != size:
            raise ValueError(
                f"{path} is {picture.shape[0]}x{picture.shape[1]} (height x width), {pictures.files[0].name} is "
                f"{size[0]}x{size[1]}; the frames of a clip have one size"
            )
        yield picture


def rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """A decoded frame as a picture [H, W, 3]."""
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image [H, W, 3], RGB."""
    return rgb(_image(path))


def read_gray16(path: Path) -> NDArray[np.uint16]:
    """An image of one 16-bit channel [H, W]."""
    frame = _image(path)
    if not frame.format.name.startswith("gray16"):
        raise ValueError(
            f"{path} has pixels of the format {frame.format.name}; depth images have one channel of 16 bits"
        )
    return frame.to_ndarray().astype(np.uint16)


def _image(path: Path) -> av.VideoFrame:
    if not path.is_file():
        raise ValueError(f"no image {path}")
    try:
        with av.open(str(path)) as container:
            return next(container.decode(video=0))
    except (av.error.FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def _read_video(path: Path, numbers: Sequence[int], size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    wanted = iter(numbers)
    want = next(wanted, None)
    last = -1
    try:
        with av.open(str(path)) as container:
            for last, frame in enumerate(container.decode(video=0)):
                if want is None:
                    return
                if last != want:
                    continue
                if (frame.height, frame.width) != size:
                    raise ValueError(f"{path}: its size changes at frame {last}; cut it there")
                yield rgb(frame)
                want = next(wanted, None)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} cannot be decoded after {last + 1} frames: {error}") from None
    if want is not None:
        raise ValueError(f"{path} gives {last + 1} frames, frame {want} is needed; the file is damaged or cut short")
