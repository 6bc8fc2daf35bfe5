"""What the network sees in a held-out clip beside what is true, as pictures and point clouds for the log.

Axes: H x W pixels, T frames, N points. Lengths are in scene scales, in the first camera's frame (x right, y down, z ahead).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fw_train.pictures.camera_path import COLOURED, PALE, CameraPath, grid_step, path_picture
from fw_train.pictures.colours import depth_legend, depth_picture, depth_scale, heat_colours, heat_legend, with_checks
from fw_train.pictures.drawing import (
    FAINT,
    MARGIN,
    PAPER,
    SMALL,
    WHITE,
    Mask,
    Panel,
    Picture,
    below,
    beside,
    blank,
    fit,
    framed,
    labelled,
    stroke,
    text_picture,
    text_width,
    write,
)

WORST_ERROR = 0.5  # relative error of a depth at which the error map is brightest, the same at every step
PATH_PX, SMALLEST_PATH = 480, 0.02
MARKED_CAMERAS = 5
BARS_PX = 640, 280  # width and height
CLOUD_POINTS = 20_000  # of each cloud
CLOUD_REACH = 1.5  # points further out along an axis, in radii of the true cloud, are left away
CLOUD_GAP = 0.1  # between the two


class Scene(NamedTuple):
    """One frame of a clip, and the cameras of all its frames; what is not finite counts as not predicted.

    Depths of an affine kind come aligned to their labels, otherwise the same colours would not mean the same.
    """

    frame: NDArray[np.uint8]  # [H, W, 3]
    depth_true: NDArray[np.floating]  # [H, W]
    depth_predicted: NDArray[np.floating]  # [H, W]
    valid: Mask  # [H, W], of the true depth
    points_true: NDArray[np.floating]  # [N, 3]
    points_predicted: NDArray[np.floating]  # [N, 3], of the same pixels
    point_colours: NDArray[np.uint8]  # [N, 3]
    cameras_true: CameraPath
    cameras_predicted: CameraPath


class Cloud(NamedTuple):
    """Points [N, 3] with x right, y up and z to the viewer, about the origin."""

    vertices: NDArray[np.float32]
    colours: NDArray[np.uint8]  # [N, 3]


def depth_sheet(scene: Scene) -> Picture:
    """Frame, true depth, predicted depth and relative error; both depths in the colours of the true one's scale."""
    scale = depth_scale(scene.depth_true.astype(np.float32), scene.valid)
    known = np.isfinite(scene.depth_predicted) & (scene.depth_predicted > 0)
    compared = scene.valid & known
    error = np.zeros(scene.valid.shape)
    np.divide(np.abs(scene.depth_predicted - scene.depth_true), scene.depth_true, out=error, where=compared)
    mean = f"{error[compared].mean():.1%}" if compared.any() else "?"
    error_picture = with_checks(heat_colours(np.clip(error / WORST_ERROR, 0, 1)), compared)
    panels = [
        Panel("frame", fit(scene.frame)),
        Panel("true depth", fit(depth_picture(scene.depth_true, scene.valid, scale))),
        Panel("predicted", fit(depth_picture(scene.depth_predicted, known, scale))),
        Panel(f"error {mean}", fit(error_picture)),
    ]
    width = panels[0].picture.shape[1]
    legend = depth_legend(scale, width, "")
    worst = heat_legend("0", f"{WORST_ERROR:.0%}+", width, rising=True)
    legends = blank(legend.shape[0], width), legend, legend, worst
    columns = [below([labelled(p), foot], MARGIN // 2) for p, foot in zip(panels, legends, strict=True)]
    in_one_row = scene.frame.shape[0] > scene.frame.shape[1]
    rows = [columns] if in_one_row else [[columns[0], columns[3]], columns[1:3]]
    return framed(below([beside(row) for row in rows]))


def camera_sheet(scene: Scene) -> Picture:
    """True and predicted camera path from above, on one grid."""
    predicted = CameraPath(*(np.asarray(part, np.float64) for part in scene.cameras_predicted))
    known = np.isfinite(predicted.centres).all(axis=1) & np.isfinite(predicted.forward).all(axis=1)
    paths, ramps = [scene.cameras_true], [PALE]
    text = ["x to the right, z up", "white: true", "blue to orange, ring: predicted"]
    if known.all():
        paths, ramps = [*paths, predicted], [*ramps, COLOURED]
        distance = np.linalg.norm(predicted.centres - scene.cameras_true.centres, axis=1).mean()
        text.append(f"mean distance {distance:.3g} scene scales")
    else:
        text.append(f"predicted: {(~known).sum()} of {len(known)} cameras are not finite")
    frames = len(scene.cameras_true.centres)
    marked = np.unique(np.linspace(0, frames - 1, MARKED_CAMERAS).round().astype(int)).tolist()
    picture = path_picture(paths, marked, PATH_PX, SMALLEST_PATH, ramps)
    text.append(f"grid {grid_step(paths, PATH_PX, SMALLEST_PATH):g} scene scales")
    return framed(below([picture, text_picture(text, PATH_PX, SMALL, FAINT)], MARGIN // 2))


def cloud(scene: Scene) -> Cloud:
    """True points on the left and predicted ones on the right, at the same size, thinned out to the same pixels."""
    count = len(scene.points_true)
    chosen = np.arange(count)
    if count > CLOUD_POINTS:  # by chance, because regular gaps would show as stripes
        chosen = np.sort(np.random.default_rng(0).choice(count, CLOUD_POINTS, replace=False))
    true = scene.points_true[chosen]
    seen = true[np.isfinite(true).all(axis=1)]
    middle = np.median(seen, axis=0) if len(seen) else np.zeros(3)
    radius = float(np.percentile(np.linalg.norm(seen - middle, axis=1), 95)) if len(seen) else 1.0
    sides = []
    for points in (true, scene.points_predicted[chosen]):
        placed = (points - middle) / max(radius, 1e-6) * np.array((1, -1, -1))
        near = np.isfinite(placed).all(axis=1) & (np.abs(placed) <= CLOUD_REACH).all(axis=1)
        sides.append(Cloud(placed[near].astype(np.float32), scene.point_colours[chosen][near]))
    widest = max(float(np.abs(side.vertices[:, 0]).max(initial=0)) for side in sides)
    shift = np.array((widest + CLOUD_GAP / 2, 0, 0), np.float32)
    left, right = sides
    return Cloud(
        np.concatenate((left.vertices - shift, right.vertices + shift)), np.concatenate((left.colours, right.colours))
    )


def bars_picture(values: list[float], names: list[str], title: str) -> Picture:
    """A bar for each value with its figure, from 0; one that is not finite has no bar."""
    width, height = BARS_PX
    picture = np.full((height, width, 3), PAPER, np.uint8)
    floor, top = height - 30, 56
    highest = max([v for v in values if np.isfinite(v)], default=0.0)
    slot = (width - 2 * MARGIN) / max(len(values), 1)
    write(picture, (MARGIN, 10), title, SMALL, WHITE)
    for number, (value, name) in enumerate(zip(values, names, strict=True)):
        left, right = MARGIN + number * slot, MARGIN + (number + 1) * slot
        share = value / highest if np.isfinite(value) and highest > 0 else 0.0
        start = round(floor - max(share, 0.0) * (floor - top))
        picture[start:floor, round(left) + 3 : round(right) - 3] = heat_colours(np.array(0.25 + 0.6 * share))
        figure = f"{value:.3g}"[:5]
        for text, row in ((figure, start - 20), (name, floor + 8)):
            write(picture, (round((left + right - text_width(text, SMALL)) / 2), row), text, SMALL, FAINT)
    stroke(picture, np.array((MARGIN, floor)), np.array((width - MARGIN, floor)), 0.6, FAINT)
    return picture
