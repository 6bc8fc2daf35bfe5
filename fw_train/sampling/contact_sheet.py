"""A generated clip on one picture: some frames, their depth, the camera path that was asked for and the predicted one.

Axes: T frames, H x W pixels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fw_train.pictures.camera_path import COLOURED, PALE, grid_step, path_of_poses, path_picture
from fw_train.pictures.colours import depth_legend, depth_picture, depth_scale
from fw_train.pictures.drawing import (
    FAINT,
    SMALL,
    Panel,
    Picture,
    below,
    beside,
    fit,
    framed,
    labelled,
    text_picture,
    wrap,
)

SHOWN = 5  # frames
GAP = 6  # between a frame and its depth
PATH_PX, SMALLEST_PATH = 400, 0.02
TEXT_PX, TEXT_LINES = 900, 3  # of each text


def contact_sheet(
    frames: NDArray[np.uint8], depth: NDArray[np.float32], paths: Sequence[NDArray[np.float64]], texts: Sequence[str]
) -> Picture:
    """Frames [T, H, W, 3], depth [T, H, W], cameras [T, 4, 4] that were asked for, if any, and predicted; lines of text."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)).tolist()
    known = np.isfinite(depth) & (depth > 0)
    scale = depth_scale(depth, known)
    columns = [
        below([labelled(Panel(f"frame {t}", fit(frames[t]))), fit(depth_picture(depth[t], known[t], scale))], GAP)
        for t in chosen
    ]
    rows = [beside(columns), depth_legend(scale, columns[0].shape[1], "")]
    seen = [path_of_poses(path) for path in paths]
    picture = path_picture(seen, chosen, PATH_PX, SMALLEST_PATH, (PALE, COLOURED)[-len(seen) :])
    step = grid_step(seen, PATH_PX, SMALLEST_PATH)
    legend = ["depth: near to far, in scene scales", "cameras from above, x to the right, z up", f"grid {step:g}"]
    legend += ["white: asked for"] * (len(seen) > 1) + ["blue to orange, ring: predicted", ""]
    lines = [line for text in texts for line in wrap(text, TEXT_PX, SMALL, TEXT_LINES)]
    return framed(below([*rows, beside([picture, text_picture([*legend, *lines], TEXT_PX, SMALL, FAINT)])]))
