"""Frames of an mp4 as the decoder gives them, 4:2:0 planes of bytes, half the size of RGB; colours follow on the device.

Axes: T frames, H x W pixels as displayed, so with the file's rotation applied; `...` any leading axes.
"""

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from numpy.typing import NDArray
from torch import Tensor

from fw_train.data.codec import Allocate

Planes = NDArray[np.uint8]
Window = tuple[int, int, int, int]  # top, left, height, width

# Shares of red and blue in luma, by the number that H.273 gives the matrix; without one it is BT.601, as ffmpeg has it.
_LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
_BT601 = (0.299, 0.114)
_FULL_RANGE = 2


class VideoError(ValueError):
    """A video that does not give the frames asked of it."""


class VideoFrames(NamedTuple):
    """Some frames of a video, or of several videos of one size with a leading axis."""

    y: Tensor  # uint8 [..., T, H, W]
    u: Tensor  # uint8 [..., T, ceil(H/2), ceil(W/2)]
    v: Tensor  # the same
    rgb_from_yuv: Tensor  # float32 [..., 3, 4]: bytes (y, u, v, 1) to red, green, blue in [-1, 1]


def decode_video(
    data: bytes, frames: Sequence[int], window: Window | None = None, empty: Allocate = np.empty
) -> VideoFrames:
    """The frames of the given ascending numbers, counted in the order of display; decodes nothing behind the last of them.

    `window` keeps a part of the frames, with even sides and corner. Frames are counted and times not read: a variable frame
    rate changes nothing. `empty` allocates the planes.
    """
    if not frames or min(frames) < 0 or any(b <= a for a, b in pairwise(frames)):
        raise ValueError(f"frames {list(frames)} must be ascending numbers from 0")
    if window is not None and any(side % 2 for side in window):
        raise ValueError(f"window (top, left, height, width) {window} must be even: chroma has half the resolution")
    found, planes, first = 0, None, None
    try:
        # The format is named, because others refer to further files.
        with av.open(io.BytesIO(data), mode="r", format="mp4") as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            stream.codec_context.options = {"err_detect": "explode"}
            for number, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise VideoError(f"frame {number} is damaged")
                if number != frames[found]:
                    continue
                picture = _Picture.of(frame)
                if planes is None or first is None:
                    # Of one frame alone: PyAV loses a little memory whenever it shows side data.
                    _refuse_mirrored(frame)
                    first, planes = picture, _allocate(len(frames), picture.y.shape, window, empty)
                elif picture.y.shape != first.y.shape or not np.array_equal(picture.matrix, first.matrix):
                    raise VideoError(f"frame {number} has another size or other colours than frame {frames[0]}")
                for kept, plane, halved in zip(planes, picture[:3], (False, True, True), strict=True):
                    kept[found] = plane if window is None else _cut(plane, window, halved)
                found += 1
                if found == len(frames):
                    return VideoFrames(*map(torch.from_numpy, (*planes, first.matrix)))
    except av.error.FFmpegError as error:
        raise VideoError(f"cannot be decoded after {found} of the {len(frames)} frames asked for: {error}") from None
    raise VideoError(f"ends before frame {frames[found]}")


def to_rgb(video: VideoFrames) -> Tensor:
    """float32 [..., T, 3, H, W] in [-1, 1], on the device of the planes.

    A chroma sample colours the four pixels that it lies between, as in ffmpeg's conversion to rgb24.
    """
    height, width = video.y.shape[-2:]
    luma, cb, cr, offset = (column[..., None, :, None, None] for column in video.rgb_from_yuv.unbind(-1))
    # Chroma is weighed before it is doubled: a quarter of the work.
    tint = cb * video.u.unsqueeze(-3) + cr * video.v.unsqueeze(-3) + offset
    tint = tint.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)[..., :height, :width]
    return tint.addcmul_(luma, video.y.unsqueeze(-3).float()).clamp_(-1, 1)


class _Picture(NamedTuple):
    """One frame as displayed."""

    y: Planes
    u: Planes
    v: Planes
    matrix: NDArray[np.float32]

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "_Picture":
        turns, full = _quarter_turns(frame), _is_full_range(frame)
        y, u, v = (np.rot90(plane, turns) for plane in _planes(frame, full))
        return cls(y, u, v, _matrix(frame.colorspace, full))


def _allocate(
    frames: int, size: tuple[int, ...], window: Window | None, empty: Allocate
) -> tuple[Planes, Planes, Planes]:
    height, width = size if window is None else window[2:]
    if window is not None and not (window[0] + height <= size[0] and window[1] + width <= size[1]):
        raise VideoError(f"frames are {size[0]}x{size[1]} (height x width), too small for the window {window}")
    half = frames, -(-height // 2), -(-width // 2)
    return empty((frames, height, width), np.uint8), empty(half, np.uint8), empty(half, np.uint8)


def _cut(plane: Planes, window: Window, halved: bool) -> Planes:
    top, left, height, width = (side // 2 for side in window) if halved else window
    return plane[top : top + height, left : left + width]


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Anticlockwise turns from the frame as coded to the frame as displayed."""
    if frame.rotation % 90:
        raise VideoError(f"is displayed at {frame.rotation} degrees; encode it again, turned by quarters at the most")
    return frame.rotation // 90 % 4


def _refuse_mirrored(frame: av.VideoFrame) -> None:
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]  # its stub names the keys str
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32, 5).tolist()
        if a * d < b * c:
            raise VideoError("is stored mirrored, which is not undone here; encode it again as it is displayed")


def _is_full_range(frame: av.VideoFrame) -> bool:
    return frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")


def _planes(frame: av.VideoFrame, full: bool) -> list[Planes]:
    """The 4:2:0 planes as coded; other formats are converted, their range and matrix kept."""
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        colour_range = _FULL_RANGE if full else 1
        frame = frame.reformat(
            format="yuv420p",
            src_colorspace=frame.colorspace,
            dst_colorspace=frame.colorspace,
            src_color_range=colour_range,
            dst_color_range=colour_range,
        )
    return [
        np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
        for plane in frame.planes
    ]


def _matrix(colorspace: int, full: bool) -> NDArray[np.float32]:
    """[3, 4]: bytes (y, u, v, 1) to (red, green, blue) in [-1, 1]."""
    red, blue = _LUMA.get(int(colorspace), _BT601)
    green = 1 - red - blue
    from_unit = np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )
    span = np.array([255, 255, 255] if full else [219, 224, 224])
    zero = np.array([0 if full else 16, 128, 128])
    scaled = 2 * from_unit / span
    return np.column_stack((scaled, -scaled @ zero - 1)).astype(np.float32)
