"""The metrics of geometry by name, and what one clip scores in them. Names, units and directions are stable: reports read them.

Axes: T frames, H x W pixels. Units: scene scales (depth, points, translations), degrees.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fw_train.batch import Batch, Prediction
from fw_train.evaluation.cameras import camera_errors
from fw_train.evaluation.consistency import View, reprojection, visible_pixels
from fw_train.evaluation.depth import align_scale_shift, depth_errors, depth_flicker
from fw_train.evaluation.diffusion import BINS, bin_name
from fw_train.evaluation.points import align_points, point_errors
from fw_train.geometry import decode_pose9
from fw_train.losses import LossParams, align, sample_losses, sample_pixels

POINTS = 4096  # of a clip; both ways 17 million distances


class Metric(NamedTuple):
    """docs/evaluation.md says what each one is."""

    name: str
    better: Literal["lower", "higher"]


GEOMETRY = (
    Metric("depth/absrel", "lower"),
    Metric("depth/rmse", "lower"),
    Metric("depth/delta1", "higher"),
    Metric("depth/absrel_aligned", "lower"),
    Metric("depth/rmse_aligned", "lower"),
    Metric("depth/delta1_aligned", "higher"),
    Metric("depth/flicker", "lower"),
    Metric("points/accuracy", "lower"),
    Metric("points/completeness", "lower"),
    Metric("points/chamfer", "lower"),
    Metric("points/pixel", "lower"),
    Metric("points/accuracy_aligned", "lower"),
    Metric("points/completeness_aligned", "lower"),
    Metric("points/chamfer_aligned", "lower"),
    Metric("points/pixel_aligned", "lower"),
    Metric("cameras/rotation_deg", "lower"),
    Metric("cameras/translation_deg", "lower"),
    Metric("cameras/ate", "lower"),
    Metric("cameras/auc30", "higher"),
    Metric("cameras/auc30_signed", "higher"),
    Metric("consistency/reprojection", "lower"),
    Metric("consistency/coverage", "higher"),
    Metric("consistency/reprojection_true_cameras", "lower"),
    Metric("loss/depth", "lower"),
    Metric("loss/point", "lower"),
    Metric("loss/camera", "lower"),
)
DIFFUSION = (
    Metric("diffusion/mean", "lower"),
    *(Metric(f"diffusion/{bin_name(index)}", "lower") for index in range(BINS)),
)


@torch.no_grad()
def clip_metrics(prediction: Prediction, batch: Batch) -> dict[str, float]:
    """What the prediction of one clip scores, by metric; those are left out of which its labels say nothing.

    A part that is not finite scores NaN.
    """
    assert batch.depth is not None
    assert batch.valid is not None
    assert batch.pose9 is not None
    scores = dict(_guide(prediction, batch))
    kind = batch.depth_kind[0] if batch.depth_kind else "metric"
    if batch.valid.any():
        if kind == "metric":
            scores |= _depth(prediction, batch)
        else:
            scores |= _depth_of_unknown_scale(prediction, batch)
        scores |= _points(prediction, batch)
    if batch.pose9.shape[1] > 1:
        scores |= _cameras(prediction, batch)
        if kind == "metric":
            scores |= _consistency(prediction, batch)
    return scores


def _guide(prediction: Prediction, batch: Batch) -> Iterator[tuple[str, float]]:
    losses = sample_losses(prediction, batch, None, LossParams("guide"))
    for name in ("depth", "point", "camera"):
        term = getattr(losses, name)
        if term.counted.all():
            yield f"loss/{name}", float(term.value)


def _depth(prediction: Prediction, batch: Batch) -> dict[str, float]:
    assert prediction.depth is not None
    assert batch.depth is not None
    assert batch.valid is not None
    p, y, valid = prediction.depth[0], batch.depth[0], batch.valid[0]
    plain, aligned = depth_errors(p, y, valid), depth_errors(align_scale_shift(p, y, valid), y, valid)
    scores = _named("depth", plain._asdict()) | _named("depth", aligned._asdict(), "_aligned")
    if (valid[1:] & valid[:-1]).any():
        scores["depth/flicker"] = float(depth_flicker(p, y, valid))
    return scores


def _depth_of_unknown_scale(prediction: Prediction, batch: Batch) -> dict[str, float]:
    """Without a zero point nothing is relative: what is left is the error in the units of `losses.align`."""
    assert prediction.depth is not None
    assert batch.depth is not None
    assert batch.valid is not None
    p, y, counted = align(prediction.depth[0], batch.depth[0], batch.valid[0], batch.depth_kind[0])
    return {"depth/rmse_aligned": float(depth_errors(p, y, batch.valid[0]).rmse)} if counted else {}


def _points(prediction: Prediction, batch: Batch) -> dict[str, float]:
    assert prediction.points is not None
    assert batch.points is not None
    assert batch.valid is not None
    position = 0 if batch.position is None else int(batch.position[0])
    pixels = sample_pixels(batch.valid[0], POINTS, position)
    p, y = (points[0].movedim(1, -1).flatten(0, 2)[pixels] for points in (prediction.points, batch.points))
    if not p.isfinite().all():
        return {metric.name: math.nan for metric in GEOMETRY if metric.name.startswith("points/")}
    plain, aligned = point_errors(p, y), point_errors(align_points(p, y), y)
    return _named("points", plain._asdict()) | _named("points", aligned._asdict(), "_aligned")


def _cameras(prediction: Prediction, batch: Batch) -> dict[str, float]:
    assert prediction.cameras is not None
    assert batch.pose9 is not None
    predicted, true = (decode_pose9(pose9[0].double())[0] for pose9 in (prediction.cameras, batch.pose9))
    if not predicted.isfinite().all():
        return {metric.name: math.nan for metric in GEOMETRY if metric.name.startswith("cameras/")}
    return _named("cameras", camera_errors(predicted, true)._asdict())


def _consistency(prediction: Prediction, batch: Batch) -> dict[str, float]:
    assert prediction.depth is not None
    assert prediction.cameras is not None
    assert batch.depth is not None
    assert batch.valid is not None
    assert batch.pose9 is not None
    true = View(batch.depth[0], *decode_pose9(batch.pose9[0].double()))
    visible = visible_pixels(true, batch.valid[0])
    if not visible.any():
        return {}
    own = reprojection(View(prediction.depth[0], *decode_pose9(prediction.cameras[0].double())), visible)
    by_true = reprojection(true._replace(depth=prediction.depth[0]), visible)
    scores = {"consistency/coverage": float(own.coverage)}
    # A clip of which no pixel lands has a coverage of 0 and no error.
    found = {"consistency/reprojection": own, "consistency/reprojection_true_cameras": by_true}
    return scores | {name: float(result.error) for name, result in found.items() if result.coverage > 0}


def _named(group: str, values: dict[str, Tensor], suffix: str = "") -> dict[str, float]:
    return {f"{group}/{name}{suffix}": float(value) for name, value in values.items()}
