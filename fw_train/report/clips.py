"""Held-out clips as a run's network saw them before its first step and after its last, beside what is true."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fw_train.batch import Prediction
from fw_train.build import load_model, world_params
from fw_train.config import Config
from fw_train.data.expand import expand_video
from fw_train.evaluation.consistency import square_intrinsics_px
from fw_train.evaluation.scenes import scene, shown_pixels
from fw_train.evaluation.validation import JUDGED_LEVEL, predict
from fw_train.geometry import decode_pose9, unproject
from fw_train.inference import load_trained
from fw_train.pictures.scene import Scene
from fw_train.precision import PRECISIONS
from fw_train.run.data import BatchMaker, HeldOut

CLOUD_REACH = 2.0  # points further out along an axis, in radii of the true cloud, are left away


class Clip(NamedTuple):
    key: str
    before: Scene
    after: Scene
    unprojected: NDArray[np.floating]  # [N, 3], the pixels of `after.points_predicted` by its depth and its cameras


class Cloud(NamedTuple):
    """Points [N, 3] with x right, y up and z to the viewer, in shares of the largest 16-bit number; bytes of RGB [N, 3]."""

    name: str
    places: NDArray[np.int16]
    colours: NDArray[np.uint8]


def clips_of(weights: Path, config: Config, count: int) -> Iterator[Clip]:
    """The first `count` held-out clips of the run that left `weights`, the camera hidden."""
    wan = world_params(config).wan
    dtype = PRECISIONS[config.train.precision].compute
    held_out, make_batch = HeldOut(config, wan, 0, 1), BatchMaker(config, wan, torch.device("cpu"))
    networks = load_model(config, "cpu").eval(), load_trained(weights).model
    for number in range(min(count, len(held_out))):
        coded = held_out.clip(number)
        batch, video = make_batch(coded), expand_video(coded, torch.device("cpu"))
        with torch.no_grad():
            seen = [
                predict(network, batch, JUDGED_LEVEL, config.train.seed, dtype, camera=False) for network in networks
            ]
        before, after = (scene(prediction, batch, video) for prediction in seen)
        yield Clip(coded.keys[0], before, after, unprojected(seen[1], after))


def with_validation(config: Config, data: Path | None) -> Config:
    """The configuration with other held-out clips, where they are given."""
    return config if data is None else replace(config, data=replace(config.data, validation=str(data)))


def unprojected(prediction: Prediction, shown: Scene) -> NDArray[np.floating]:
    """Where predicted depth and cameras put the pixels that have points in the scene."""
    assert prediction.cameras is not None
    frame = prediction.cameras.shape[1] // 2
    poses, fov_y_rad = decode_pose9(prediction.cameras[0, frame].double())
    depth = torch.from_numpy(shown.depth_predicted).double()
    points = unproject(depth, square_intrinsics_px(fov_y_rad, *depth.shape), poses)
    return points.flatten(1).T[shown_pixels(torch.from_numpy(shown.valid))].numpy()


def clouds(clip: Clip) -> list[Cloud]:
    """Predicted and true points of a clip, about the same middle and of the same size."""
    seen = clip.after
    true = seen.points_true[np.isfinite(seen.points_true).all(axis=1)]
    if not len(true):
        return []
    middle = np.median(true, axis=0)
    radius = max(float(np.percentile(np.linalg.norm(true - middle, axis=1), 95)), 1e-6)
    found = []
    for name, points in (
        ("predicted depth and camera", clip.unprojected),
        ("predicted points", seen.points_predicted),
        ("true points", seen.points_true),
    ):
        # From x right, y down, z ahead to what screens use.
        placed = (points - middle) / radius * np.array((1, -1, -1)) / CLOUD_REACH
        near = np.isfinite(placed).all(axis=1) & (np.abs(placed) <= 1).all(axis=1)
        found.append(Cloud(name, np.rint(placed[near] * 32767).astype(np.int16), seen.point_colours[near]))
    return found
