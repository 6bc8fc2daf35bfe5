"""A generated clip on one picture: some frames, their depth, the camera path that was asked for and the predicted one.

Axes: T frames, H x W pixels.
"""

import numpy as np
from numpy.typing import NDArray

from fw_train.camera_path import COLOURED, PALE, grid_step, path_of_poses, path_picture
from fw_train.colours import depth_legend, depth_picture, depth_scale
from fw_train.drawing import FAINT, MARGIN, SMALL, Panel, Picture, below, beside, fit, framed, labelled, text_picture
from fw_train.drawing import wrap as wrapped

SHOWN = 5  # frames
PATH_PX, SMALLEST_PATH = 400, 0.02
TEXT_PX, TEXT_LINES = 900, 3  # of each text


def contact_sheet(
    frames: NDArray[np.uint8],
    depth: NDArray[np.float32],
    predicted: NDArray[np.float64],
    requested: NDArray[np.float64] | None,
    texts: list[str],
) -> Picture:
    """Frames [T, H, W, 3], depth [T, H, W], cameras [T, 4, 4] in the first one's frame, and lines of text beside the path."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)).tolist()
    known = np.isfinite(depth) & (depth > 0)
    scale = depth_scale(depth, known)
    columns = [
        below([labelled(Panel(f"frame {t}", fit(frames[t]))), fit(depth_picture(depth[t], known[t], scale))], MARGIN)
        for t in chosen
    ]
    rows = [beside(columns), depth_legend(scale, columns[0].shape[1], "")]
    paths, ramps = [path_of_poses(predicted)], [COLOURED]
    if requested is not None:
        paths, ramps = [path_of_poses(requested), *paths], [PALE, *ramps]
    marked = np.unique(np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)).tolist()
    picture = path_picture(paths, marked, PATH_PX, SMALLEST_PATH, ramps)
    legend = [
        "cameras from above, x to the right, z up",
        f"grid {grid_step(paths, PATH_PX, SMALLEST_PATH):g} scene scales",
    ]
    legend += ["white: asked for"] * (requested is not None) + ["blue to orange, ring: predicted", ""]
    lines = [line for text in texts for line in wrapped(text, TEXT_PX, SMALL, TEXT_LINES)]
    rows.append(beside([picture, text_picture([*legend, *lines], TEXT_PX, SMALL, FAINT)]))
    return framed(below(rows))
