import io
import os
import shutil
import subprocess

import av
import numpy as np
import pytest
import torch
from raw_clips import write_video

from fw_train.data.schema import video_facts
from fw_train.data.video import VideoError, decode_video, to_rgb

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="the ffmpeg program is not installed")
HEIGHT, WIDTH = 64, 96


def ffmpeg(*words):
    return subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, words)], check=True, capture_output=True).stdout


def frames_of_ffmpeg(path, pixels, size):
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", pixels, "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, *size)


def real_video(path, rotation=0, *options, look="hue=s=0.6"):
    """Moving pictures with B-frames whose frames last one or three ticks."""
    first = path.with_suffix(".first.mp4")
    source = f"testsrc2=size={WIDTH}x{HEIGHT}:rate=25:duration=2"
    uneven = f"{look},setpts='(N+2*floor(N/3))/25/TB'"
    codec = "-c:v", "libx264", "-bf", 3, "-b_strategy", 0, "-g", 12, "-pix_fmt", "yuv420p"
    ffmpeg("-f", "lavfi", "-i", source, "-vf", uneven, "-fps_mode", "vfr", *codec, *options, first)
    ffmpeg("-i", first, "-c", "copy", "-metadata:s:v", f"rotate={rotation}", path)
    return path.read_bytes()


@needs_ffmpeg
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_b_frames_uneven_times_and_rotation_give_the_frames_that_ffmpeg_shows(tmp_path, rotation):
    data = real_video(tmp_path / "clip.mp4", rotation)
    with av.open(io.BytesIO(data)) as container:
        packets = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert packets != sorted(packets), "no B-frames"
    assert len(set(np.diff(sorted(packets)))) > 1, "an even frame rate"
    with av.open(io.BytesIO(data)) as container:
        assert next(container.decode(video=0)).rotation % 360 == rotation, "a file that is not turned"
    height, width = (WIDTH, HEIGHT) if rotation % 180 else (HEIGHT, WIDTH)
    flat = frames_of_ffmpeg(tmp_path / "clip.mp4", "yuv420p", (height * width * 3 // 2,))
    whole = decode_video(data, range(len(flat)))
    assert whole.y.shape == (len(flat), height, width)
    for planes, place in ((whole.y, 0), (whole.u, 4), (whole.v, 5)):
        start = height * width * place // 4
        wanted = flat[:, start : start + planes[0].numel()].reshape(planes.shape)
        assert np.array_equal(planes.numpy(), wanted)
    some = decode_video(data, [1, 7, 20])
    assert all(torch.equal(a, b[[1, 7, 20]]) for a, b in zip(some[:3], whole[:3], strict=True))


@needs_ffmpeg
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"),
        ("-pix_fmt", "yuvj420p"),
    ],
    ids=["bt601", "bt709", "full-range"],
)
def test_colours_are_those_of_ffmpeg(tmp_path, options):
    data = real_video(tmp_path / "clip.mp4", 0, *options)
    wanted = frames_of_ffmpeg(tmp_path / "clip.mp4", "rgb24", (HEIGHT, WIDTH, 3)).astype(float)
    rgb = to_rgb(decode_video(data, range(len(wanted))))
    assert rgb.shape == (len(wanted), 3, HEIGHT, WIDTH)
    assert rgb.dtype == torch.float32
    assert rgb.min() >= -1
    assert rgb.max() <= 1
    off = np.abs((rgb.movedim(1, -1).numpy() + 1) * 127.5 - wanted)
    assert off.mean() < 1.3  # it rounds down
    assert np.quantile(off, 0.99) < 2.5
    assert off.max() < 4


@needs_ffmpeg
def test_other_pixel_formats_keep_range_and_matrix(tmp_path):
    def rgb(pixels):
        data = real_video(tmp_path / "clip.mp4", 0, "-crf", "1", "-pix_fmt", pixels, look="boxblur=6")
        return to_rgb(decode_video(data, [0, 9]))

    plain = rgb("yuv420p")
    for name in ("yuv444p", "yuv420p10le", "yuvj444p"):
        assert (plain - rgb(name)).abs().mean() < 0.01, name


def test_several_videos_convert_as_each_alone(tmp_path):
    write_video(tmp_path / "a.mp4", 5, 32, 48)
    video = decode_video((tmp_path / "a.mp4").read_bytes(), range(5))
    other = video._replace(rgb_from_yuv=video.rgb_from_yuv * 0.9)
    both = type(video)(*(torch.stack(pair) for pair in zip(video, other, strict=True)))
    assert torch.equal(to_rgb(both), torch.stack([to_rgb(video), to_rgb(other)]))


def test_a_window_is_a_part_of_the_frames(tmp_path):
    write_video(tmp_path / "a.mp4", 5, 32, 48)
    data = (tmp_path / "a.mp4").read_bytes()
    whole, part = decode_video(data, [0, 3]), decode_video(data, [0, 3], window=(4, 10, 16, 32))
    assert torch.equal(part.y, whole.y[:, 4:20, 10:42])
    assert torch.equal(part.u, whole.u[:, 2:10, 5:21])
    assert torch.equal(to_rgb(part), to_rgb(whole)[..., 4:20, 10:42])
    with pytest.raises(ValueError, match="must be even"):
        decode_video(data, [0], window=(1, 0, 16, 16))
    with pytest.raises(VideoError, match="frames are 32x48 .* too small for the window"):
        decode_video(data, [0], window=(0, 0, 34, 16))


class CountingContainer:
    """A container that notes how many threads the process has with each frame that is decoded."""

    def __init__(self, container, counts):
        self.container, self.counts, self.streams = container, counts, container.streams

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.counts.append(len(os.listdir("/proc/self/task")))
            yield frame


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="on one core FFmpeg begins no threads by itself")
@pytest.mark.parametrize(
    "decode",
    [lambda data: decode_video(data, range(5)), lambda data: video_facts(data, "a.mp4", 5)],
    ids=["loader", "packing"],
)
def test_decoding_begins_no_threads(tmp_path, monkeypatch, decode):
    """A node has a loader process for each core: FFmpeg's own choice, a thread for each core, would be one in each of these."""
    write_video(tmp_path / "a.mp4", 5, 128, 128)
    data = (tmp_path / "a.mp4").read_bytes()
    counts, av_open = [], av.open
    monkeypatch.setattr(av, "open", lambda *words, **named: CountingContainer(av_open(*words, **named), counts))
    before = len(os.listdir("/proc/self/task"))
    decode(data)
    assert counts == [before] * 5


def test_nothing_is_decoded_behind_the_last_frame(tmp_path):
    write_video(tmp_path / "a.mp4", 40, 32, 48, g="4", bf="0")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    mdat = data.index(b"mdat")
    with av.open(io.BytesIO(bytes(data))) as container:
        at = [packet.pos for packet in container.demux(video=0) if packet.pts is not None]
    data[at[30] + 4 : at[40 - 1]] = bytes(at[39] - at[30] - 4)
    assert mdat < at[30]
    assert len(decode_video(bytes(data), range(8)).y) == 8
    with pytest.raises(VideoError):
        decode_video(bytes(data), range(40))


def test_videos_that_do_not_give_the_frames_are_refused(tmp_path):
    write_video(tmp_path / "a.mp4", 5, 32, 48)
    data = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(VideoError, match="ends before frame 5"):
        decode_video(data, range(6))
    for broken in (b"", data[:100], data[: len(data) // 2], bytes(len(data))):
        with pytest.raises(VideoError, match="cannot be decoded after 0 of the 5 frames"):
            decode_video(broken, range(5))
    for frames in ([], [2, 1], [1, 1], [-1]):
        with pytest.raises(ValueError, match="ascending"):
            decode_video(data, frames)
