"""What can be wrong with a clip, and what finds it; pure functions of decoded members.

Axes: T frames, N chosen frames, H x W pixels.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_tools.audit_geometry import Diagnosis, Labels
from fw_train.batch import DepthKind
from fw_train.geometry import Cameras, relative_to_first, rotation_angle_deg

GRID = 28  # pixels along each side that geometry is compared at
MOVES_PX = 1.0  # between two frames; a camera that moves less may leave the picture as it is
STILL_PER_PX = 0.03  # grey levels of change by which a picture may differ from a repeated one, per pixel of motion
STILL_SHARE = 0.1  # of the change per pixel of motion that the clip has elsewhere
CHANGES_SHARE = 0.3  # of the clip's usual change: the video certainly moves
CHANGES = 0.5  # grey levels between two frames: more than the noise of a codec
CHANGES_MUCH = 4.0  # grey levels: more than film grain

Bits = NDArray[np.bool_]
Float = NDArray[np.float64]


class Fault(NamedTuple):
    title: str
    remedy: str
    serious: bool = True  # a reason for quarantine, unless the user says otherwise


class Finding(NamedTuple):
    """A fault of a clip with its evidence."""

    fault: str
    detail: str


FAULTS = {
    "unreadable": Fault("Cannot be read", "Run `fw data verify`; pack the clip again or leave it out."),
    "not-finite": Fault("Cameras with NaN", "Estimate the cameras again, or leave the clip out."),
    "pose-inverted": Fault(
        "c2w and w2c swapped", "Invert the matrices: camera files hold world-to-camera (cam_from_world), row-major 3x4."
    ),
    "rotation-transposed": Fault(
        "Rotation transposed", "Transpose the 3x3 part, or read the file row by row; the translation stays as it is."
    ),
    "translation-is-centre": Fault(
        "Camera centre as translation", "Write t = -R c in the last column, c being the camera's centre."
    ),
    "opengl-axes": Fault("OpenGL axes", "Negate y and z: cameras look along +z, x points right, y down."),
    "points-not-in-first-camera": Fault(
        "Points in another frame", "Take the points on into the first camera's frame before packing."
    ),
    "wrong-intrinsics": Fault(
        "Wrong intrinsics convention",
        "Give fx and cx as fractions of the width, fy and cy as fractions of the height of these very frames; "
        "for cropped clips set original_width and original_height.",
    ),
    "scale-mismatch": Fault(
        "Scales differ", "Bring depth, points and translations to one unit; multiply by the factor in the evidence."
    ),
    "wrong-depth-kind": Fault(
        "Wrong kind of depth", "Correct depth_kind in metadata.json, or store z-depth where rays' lengths were stored."
    ),
    "geometry-disagrees": Fault(
        "Depth, points and cameras disagree", "Estimate the labels again with one method, or leave the clip out."
    ),
    "empty-frames": Fault(
        "Frames without labels (NaN)", "Estimate depth and points of these frames again, or cut the clip before them."
    ),
    "low-coverage": Fault("Few valid pixels", "Leave the clip out, or lower --min-coverage if so little is expected."),
    "frozen-video": Fault(
        "Video repeats frames", "Cut the clip, or decode it at its own frame rate, so that every label has its frame."
    ),
    "frozen-labels": Fault(
        "Labels repeat while the video moves",
        "Make labels for every frame instead of repeating those of an earlier one.",
    ),
    "duplicate-clip": Fault(
        "Same video as another clip", "Keep one of them; the others weigh the clip more than the rest.", serious=False
    ),
    "caption-missing": Fault(
        "No caption", "Write a caption; without one the clip trains the unconditional branch alone.", serious=False
    ),
}


def grid_labels(
    depth: NDArray[np.float32],
    points: NDArray[np.float32],
    valid: Bits,
    cameras: Cameras,
    chosen: Sequence[int],
    kind: DepthKind,
    grid: tuple[int, int] = (GRID, GRID),
) -> Labels:
    """A grid of pixels of depth [N, H, W], points [N, H, W, 3] and validity [N, H, W]; the cameras are those of all frames."""
    height, width = valid.shape[1:]
    rows, columns = (
        ((np.arange(min(count, side)) + 0.5) * (side / min(count, side))).astype(int)
        for count, side in zip(grid, (height, width), strict=True)
    )
    at = np.ix_(range(len(chosen)), rows, columns)
    place = np.stack(np.meshgrid((columns + 0.5) / width, (rows + 0.5) / height), axis=-1)
    return Labels(
        torch.from_numpy(depth[at].astype(np.float64)).flatten(1),
        torch.from_numpy(points[at].astype(np.float64)).flatten(1, 2),
        torch.from_numpy(valid[at]).flatten(1),
        torch.from_numpy(place).flatten(0, 1),
        cameras.cam_from_world[list(chosen)],
        cameras.intrinsics_frac[list(chosen)],
        kind,
        (height, width),
    )


def check_geometry(diagnosis: Diagnosis, chosen: Sequence[int], tolerance: float) -> list[Finding]:
    """What a diagnosis says, in words."""
    given, repaired = diagnosis.given, diagnosis.repaired
    if diagnosis.changes:
        end = f"; the error falls from {percent(given.error)} to {percent(repaired.error)}"
        if diagnosis.alike:
            end += f"; this clip looks the same where {' or where '.join(diagnosis.alike)}"
        pairs = zip(diagnosis.changes, diagnosis.sentences, strict=True)
        return [Finding(change.fault, what + end) for change, what in pairs]
    if given.error <= tolerance:
        return []
    wrong = [frame for frame, error in zip(chosen, given.frame_errors, strict=True) if error > tolerance]
    return [
        Finding(
            "geometry-disagrees",
            f"unprojected depth is {percent(given.error)} off the points in {frames_text(wrong)}, of {frames_text(chosen)} that "
            f"were compared; no single mistake explains it, the best guess leaves {percent(diagnosis.best.error)}",
        )
    ]


def check_coverage(depth: Float, points: Float, both: Float, least: float) -> list[Finding]:
    """Judges the fractions [T] of valid pixels of depth, of points, and of both at once."""
    found = []
    empty = np.flatnonzero(both == 0)
    if len(empty):
        missing = [name for name, share in (("depth", depth), ("points", points)) if (share[empty] == 0).any()]
        what = " and ".join(missing) if missing else "pixel with both depth and points"
        found.append(Finding("empty-frames", f"no valid {what} in {frames_text(empty)} of {len(both)}"))
    few = np.flatnonzero((both < least) & (both > 0))
    if len(few):
        found.append(
            Finding(
                "low-coverage",
                f"{percent(both[few].min())} of the pixels have depth and points in frame {few[both[few].argmin()]}, "
                f"less than {percent(least)} in {frames_text(few)}; the clip has {percent(both.mean())}",
            )
        )
    return found


def camera_motion_px(cameras: Cameras, scene_scale: float, width: int) -> Float:
    """By about how many pixels the picture moves from each frame to the next, [T - 1]."""
    pose = relative_to_first(cameras.cam_from_world)
    angle = torch.deg2rad(rotation_angle_deg(pose[:-1, :3, :3], pose[1:, :3, :3]))
    shift = (pose[1:, :3, 3] - pose[:-1, :3, 3]).norm(dim=-1) / scene_scale
    focal = cameras.intrinsics_frac[1:, 0].clamp(0.1, 10) * width  # a wrong one is another check's business
    return ((angle + shift) * focal).numpy()


def check_motion(change: Float, motion_px: Float, repeated: Bits) -> list[Finding]:
    """Looks for frozen pictures and labels in the change of the picture, the camera's motion and repeated labels, all [T - 1]."""
    found: list[Finding] = []
    if not len(change):
        return found
    moving = motion_px > MOVES_PX
    if moving.any():
        rate = change[moving] / motion_px[moving]
        frozen = moving & (change < max(STILL_SHARE * np.median(rate), STILL_PER_PX) * motion_px)
        if frozen.any():
            found.append(
                Finding(
                    "frozen-video",
                    f"{frames_text(np.flatnonzero(frozen) + 1)} of {len(change) + 1} show the picture of the frame before while "
                    f"the camera moves by {motion_px[frozen].mean():.1f} px a frame; it changes by "
                    f"{change[frozen].mean():.2f} grey levels there, by {np.median(change):.2f} in the clip",
                )
            )
    if repeated.all():
        stuck = repeated & (moving | (np.median(change) > CHANGES_MUCH))
    else:
        stuck = repeated & (moving | (change > max(CHANGES, CHANGES_SHARE * np.median(change[~repeated]))))
    if stuck.any():
        found.append(
            Finding(
                "frozen-labels",
                f"depth or points of {frames_text(np.flatnonzero(stuck) + 1)} of {len(change) + 1} are those of the frame "
                f"before, bit for bit, while the picture changes by {change[stuck].mean():.1f} grey levels",
            )
        )
    return found


def frames_text(frames: Sequence[int] | NDArray[np.int64]) -> str:
    return f"frame{'s' if len(frames) > 1 else ''} {spans(frames)}"


def spans(frames: Sequence[int] | NDArray[np.int64]) -> str:
    """Ascending numbers as `3, 7 to 9`, the first few of them."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(map(int, frames)), key=lambda pair: pair[1] - pair[0])]
    parts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts[:8]) + (", ..." if len(parts) > 8 else "")


def percent(share: float) -> str:
    return "less than 0.01 %" if 0 < share < 1e-4 else f"{100 * share:.3g} %"
