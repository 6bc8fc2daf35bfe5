"""What the network is given for one clip: text, first frame and camera as a batch of one, checked against the variant.

Axes: T frames, F latent frames, H x W pixels, L text tokens, D text features.
"""

from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from torch import Tensor

from fw_train.batch import LATENT_CHANNELS, SPATIAL_STRIDE, Batch, latent_frames
from fw_train.conditioning import complete
from fw_train.data.expand import pad_text
from fw_train.encoders.latents import LatentCodec, first_frame_video
from fw_train.model.wan import PATCH, WanParams
from fw_train.sampling.encoders import RunEncoders
from fw_train.sampling.trajectories import Trajectory, camera_inputs


class Shape(NamedTuple):
    """The clip that is made."""

    frames: int
    height: int
    width: int

    @property
    def size_px(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def latents(self) -> tuple[int, int, int, int]:
        return LATENT_CHANNELS, latent_frames(self.frames), self.height // SPATIAL_STRIDE, self.width // SPATIAL_STRIDE

    def check(self) -> None:
        latent_frames(self.frames)
        side = SPATIAL_STRIDE * PATCH
        if self.height < side or self.width < side or self.height % side or self.width % side:
            near = (max(side, round(v / side) * side) for v in self.size_px)
            raise ValueError(
                f"{self.height}x{self.width} cannot be cut into tokens of {side}x{side} pixels; use {'x'.join(map(str, near))}"
            )


def takes_image(wan: WanParams) -> bool:
    return bool(wan.inputs.image_channels or wan.inputs.clip or wan.reference_conv)


def check_image(wan: WanParams, image: Path | None) -> None:
    """A first frame is given where the variant takes one, and only there."""
    if image is not None and not takes_image(wan):
        raise ValueError(f"the Wan variant '{wan.variant}' takes no first frame; leave --image out")
    if image is None and takes_image(wan):
        raise ValueError(f"the Wan variant '{wan.variant}' starts from a first frame; give it with --image FIRST.png")


def check_camera(wan: WanParams, stage: str) -> None:
    """Refuses a camera that the video would not see."""
    if stage == "stage1" and not wan.inputs.camera_channels:
        raise ValueError(
            f"the video of a stage-1 network of the Wan variant '{wan.variant}' does not see the camera: its geometry branch "
            "does, which steers the video from stage 2 on. Sample a stage-2 checkpoint, or leave the camera out"
        )


def read_first_frame(path: Path, shape: Shape) -> Tensor:
    """fp32 [1, 3, H, W] in [-1, 1]."""
    if not path.is_file():
        raise ValueError(f"no image {path}")
    try:
        with av.open(str(path)) as container:
            pixels = next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (av.error.FFmpegError, IndexError, StopIteration) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    height, width = pixels.shape[:2]
    if (height, width) != shape.size_px:
        raise ValueError(
            f"{path} is {height}x{width} (height x width), the clip {shape.height}x{shape.width}; scale the image, or give "
            f"--size {height}x{width}"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None] / 127.5 - 1


def conditions(
    wan: WanParams,
    shape: Shape,
    text: Tensor,
    image: Tensor | None,
    trajectory: Trajectory | None,
    codec: LatentCodec,
    encoders: RunEncoders,
) -> Batch:
    """The batch of one, with zeros for latents and in fp32; text [L, D], image [1, 3, H, W].

    Without a trajectory every path of the camera is closed, as for a training sample whose camera was dropped.
    """
    camera = None if trajectory is None else camera_inputs(trajectory, shape.size_px)
    channels, frames = wan.inputs.camera_channels, shape.latents[1]
    rays = None
    if channels:
        rays = torch.zeros(1, channels, frames, *shape.size_px) if camera is None else camera.control_camera
    batch = Batch(
        torch.zeros(1, *shape.latents),
        text[None],
        clip=encoders.image().encode(image).float().cpu() if image is not None and wan.inputs.clip else None,
        image_latents=None if image is None else codec.encode(first_frame_video(image, shape.frames)).cpu(),
        control_camera=rays,
        pose9=None if camera is None else camera.pose9,
    )
    return complete(batch, wan)


def padded_text(text: Tensor, tokens: int, features: int) -> Tensor:
    """[L, D] of an embedding [n, D], as in training."""
    if text.shape[1] != features:
        raise ValueError(
            f"the text has {text.shape[1]} features, the network takes {features} (model.text_dim); give the encoder that the "
            "run's data were encoded with"
        )
    return pad_text(text, tokens)
