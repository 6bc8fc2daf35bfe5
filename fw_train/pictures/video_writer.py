"""Pictures to H.264 files that repeat byte for byte."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

CRF = "12"  # H.264 quality, visually lossless
# Without it x264 gives other bytes from run to run on processors with AVX-512.
REPEATABLE = {"x264-params": "cpu-independent=1"}


@contextmanager
def video_writer(
    path: Path, fps: int | Fraction, height: int, width: int
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Takes pictures [H, W, 3] one by one; the same pictures give the same bytes."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": CRF, "preset": "medium", **REPEATABLE})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.thread_count = 1

        def add_picture(picture: NDArray[np.uint8]) -> None:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

        yield add_picture
        container.mux(stream.encode())
