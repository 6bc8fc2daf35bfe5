"""A frame of a clip as it is and as it was predicted, ready to be drawn."""

from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from fw_train.batch import Batch, Prediction
from fw_train.geometry import decode_pose9
from fw_train.losses import align
from fw_train.pictures.camera_path import CameraPath, path_of_poses
from fw_train.pictures.scene import Scene

SHOWN_POINTS = 20_000


def scene(prediction: Prediction, batch: Batch, video: Tensor) -> Scene:
    """The middle frame of the one clip of a batch; `video` [1, T, 3, H, W] in [-1, 1]."""
    assert batch.depth is not None
    assert batch.valid is not None
    assert batch.points is not None
    assert batch.pose9 is not None
    assert prediction.depth is not None
    assert prediction.points is not None
    assert prediction.cameras is not None
    t = batch.depth.shape[1] // 2
    kind = batch.depth_kind[0] if batch.depth_kind else "metric"
    depth, label, _ = align(prediction.depth[0], batch.depth[0], batch.valid[0], kind)
    frame = ((video[0, t].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    pixels = shown_pixels(batch.valid[0, t])

    def at(points: Tensor) -> Tensor:
        return points[0, t].float().flatten(1)[:, pixels].T

    return Scene(
        frame=_numpy(frame),
        depth_true=_numpy(label[t].float()),
        depth_predicted=_numpy(depth[t].float()),
        valid=_numpy(batch.valid[0, t]),
        points_true=_numpy(at(batch.points)),
        points_predicted=_numpy(at(prediction.points)),
        point_colours=_numpy(frame.flatten(0, 1)[pixels]),
        cameras_true=_path(batch.pose9[0]),
        cameras_predicted=_path(prediction.cameras[0]),
    )


def shown_pixels(valid: Tensor) -> Tensor:
    """Which of the valid pixels [H, W] have points in a scene: places in the flattened frame, thinned out evenly."""
    pixels = valid.flatten().nonzero().squeeze(1)
    return pixels[:: max(1, len(pixels) // SHOWN_POINTS)]


def _path(pose9: Tensor) -> CameraPath:
    return path_of_poses(_numpy(decode_pose9(pose9.double())[0]))


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
