"""How far a predicted camera path is from the true one; one clip at a time.

Axes: T frames. Poses are c2w [T, 4, 4] in the first true camera's frame, translations in scene scales.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fw_train.geometry import absolute_trajectory_error, auc_deg, relative_pose_errors

THRESHOLD_DEG = 30


class CameraErrors(NamedTuple):
    """fp64 scalars; over all pairs of frames i < j except `ate`, which is over the frames."""

    rotation_deg: Tensor  # mean angle between the relative rotations
    translation_deg: Tensor  # mean angle between the directions of the relative translations
    ate: Tensor  # root mean square distance of the centres after the best similarity, scene scales
    auc30: Tensor  # area under the recall of the larger of the two angles up to 30 degrees, as VGGT reports it
    auc30_signed: Tensor  # the same where moving the opposite way is wrong


def camera_errors(predicted: Tensor, true: Tensor) -> CameraErrors:
    """Compares camera paths [T, 4, 4] of at least two frames."""
    predicted, true = predicted.double(), true.double()
    pairs = relative_pose_errors(predicted, true)
    # VGGT compares lines of movement: going backwards instead of ahead is no error there.
    unsigned = torch.minimum(pairs.translation_deg, 180 - pairs.translation_deg)
    return CameraErrors(
        rotation_deg=pairs.rotation_deg.mean(),
        translation_deg=pairs.translation_deg.mean(),
        ate=absolute_trajectory_error(predicted, true),
        auc30=auc_deg(pairs._replace(translation_deg=unsigned), THRESHOLD_DEG),
        auc30_signed=auc_deg(pairs, THRESHOLD_DEG),
    )
