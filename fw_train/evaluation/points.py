"""How far predicted points are from the true surface, and how much of it they cover; one clip at a time.

Axes: N points. Lengths are in scene scales. Both clouds come from the same pixels, so that a perfect prediction scores 0;
the points are compared with whichever is nearest, except for `pixel`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fw_train.geometry import align_similarity
from fw_train.losses import nearest


class PointErrors(NamedTuple):
    """Mean distances, fp64 scalars."""

    accuracy: Tensor  # from predicted points to the nearest true one
    completeness: Tensor  # from true points to the nearest predicted one
    chamfer: Tensor  # the mean of the two
    pixel: Tensor  # from predicted points to the true ones of their pixels


def point_errors(prediction: Tensor, label: Tensor) -> PointErrors:
    """Compares clouds [N, 3]."""
    prediction, label = prediction.double(), label.double()
    of_prediction, of_label = nearest(prediction, label)
    accuracy = torch.linalg.vector_norm(prediction - label[of_prediction], dim=-1).mean()
    completeness = torch.linalg.vector_norm(label - prediction[of_label], dim=-1).mean()
    pixel = torch.linalg.vector_norm(prediction - label, dim=-1).mean()
    return PointErrors(accuracy, completeness, (accuracy + completeness) / 2, pixel)


def align_points(prediction: Tensor, label: Tensor) -> Tensor:
    """Points fp64 [N, 3] after the similarity that brings them closest to those of the same pixels (Umeyama)."""
    prediction = prediction.double()
    scale, rotation, translation = align_similarity(prediction, label.double())
    return scale * (prediction @ rotation.mT) + translation
