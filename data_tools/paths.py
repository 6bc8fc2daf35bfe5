"""Camera paths around the synthetic stage: orbit, dolly, pan, crane, handheld."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from data_tools.scene_shapes import Vector

PathKind = Literal["orbit", "dolly", "pan", "crane", "handheld"]
PATH_KINDS: tuple[PathKind, ...] = get_args(PathKind)

SWAYS = 6  # a hand shifts a camera along three axes and turns it about three, each the sum of three sine waves


class CameraPath(NamedTuple):
    """Where a camera starts and how it moves; `amount` is signed: right, forward and up are positive.

    `amount` is in radians for orbit and pan, metres for dolly and crane, and scales the unsteadiness of a handheld camera.
    """

    kind: PathKind
    amount: float
    azimuth_rad: float
    distance_m: float
    height_m: float
    target: Vector
    sway_hz: tuple[Vector, ...]  # SWAYS of them
    sway_phase: tuple[Vector, ...]


def sample_path(rng: np.random.Generator, kinds: Sequence[PathKind] = PATH_KINDS) -> CameraPath:
    """A path whose cameras all stay outside a circle of 3.4 m and inside one of 6.2 m around the middle of the stage."""
    kind = kinds[int(rng.integers(len(kinds)))]
    side = 1.0 if rng.random() < 0.5 else -1.0
    largest = {
        "orbit": rng.uniform(0.6, 1.2),
        "dolly": rng.uniform(1.0, 1.8),
        "pan": rng.uniform(0.5, 0.8),
        "crane": rng.uniform(0.9, 1.5),
        "handheld": rng.uniform(0.7, 1.3),
    }[kind]
    amount = largest if kind == "handheld" else side * largest
    distance, height = rng.uniform(4.1, 5.0), rng.uniform(1.1, 2.0)
    if kind == "dolly":
        distance = rng.uniform(5.3, 5.9) if amount > 0 else rng.uniform(3.7, 4.2)
    if kind == "crane":
        height = rng.uniform(0.7, 1.1) if amount > 0 else rng.uniform(2.1, 2.6)
    return CameraPath(
        kind,
        float(amount),
        float(rng.uniform(-math.pi, math.pi)),
        float(distance),
        float(height),
        (0.0, -float(rng.uniform(0.3, 0.6)), 0.0),
        _vectors(rng.uniform(0.3, 1.2, (SWAYS, 3))),
        _vectors(rng.uniform(0, 2 * math.pi, (SWAYS, 3))),
    )


def stage_from_cam(path: CameraPath, frames: int, fps: float) -> NDArray[np.float64]:
    """The cameras [T, 4, 4] of a clip; slow at both ends, except for a hand, which never rests."""
    poses = []
    for frame in range(frames):
        u = frame / max(frames - 1, 1)
        poses.append(_pose(path, u * u * (3 - 2 * u), frame / fps))
    return np.stack(poses)


def describe_path(path: CameraPath) -> str:
    """What the camera does, as the end of a sentence."""
    forwards = path.amount > 0
    return {
        "orbit": f"the camera orbits {'anticlockwise' if forwards else 'clockwise'}",  # as seen from above
        "dolly": f"the camera moves {'forward' if forwards else 'back'}",
        "pan": f"the camera pans to the {'right' if forwards else 'left'}",
        "crane": f"the camera {'rises' if forwards else 'sinks'}",
        "handheld": "the camera is held by hand",
    }[path.kind]


def stage_right(azimuth_rad: float) -> Vector:
    """The direction along the ground that points right for a camera at this azimuth looking at the middle."""
    return math.cos(azimuth_rad), 0.0, math.sin(azimuth_rad)


def _pose(path: CameraPath, progress: float, seconds: float) -> NDArray[np.float64]:
    azimuth = path.azimuth_rad + (path.amount * progress if path.kind == "orbit" else 0)
    distance = path.distance_m - (path.amount * progress if path.kind == "dolly" else 0)
    height = path.height_m + (path.amount * progress if path.kind == "crane" else 0)
    eye = np.array((distance * math.sin(azimuth), -height, -distance * math.cos(azimuth)))
    pose = _look_at(eye, np.array(path.target))
    if path.kind == "pan":
        pose[:3, :3] = _turn("y", path.amount * (progress - 0.5)) @ pose[:3, :3]
    if path.kind == "handheld":
        sway = np.sin(2 * math.pi * np.array(path.sway_hz) * seconds + np.array(path.sway_phase)).mean(axis=1)
        shift, angle = 0.15 * path.amount * sway[:3], 0.06 * path.amount * sway[3:]
        pose[:3, 3] += pose[:3, :3] @ shift
        pose[:3, :3] = pose[:3, :3] @ _turn("y", angle[0]) @ _turn("x", angle[1]) @ _turn("z", 0.5 * angle[2])
    return pose


def _look_at(eye: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """A camera at `eye` that looks at `target` without roll."""
    ahead = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross((0.0, 1.0, 0.0), ahead)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack((right, np.cross(ahead, right), ahead), axis=1)
    pose[:3, 3] = eye
    return pose


def _turn(axis: Literal["x", "y", "z"], angle: float) -> NDArray[np.float64]:
    """A right-handed rotation [3, 3]; about y it takes z towards x, so a camera looks further right."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    rotation = np.eye(3)
    rotation[i, i] = rotation[j, j] = math.cos(angle)
    rotation[j, i], rotation[i, j] = math.sin(angle), -math.sin(angle)
    return rotation


def _vectors(values: NDArray[np.float64]) -> tuple[Vector, ...]:
    return tuple((float(a), float(b), float(c)) for a, b, c in values)
