"""What each Wan variant takes beside latents and text, made from what a sample has.

The image conditioning of a clip is its own first frame: `image_latents` arrive as the VAE's 16 channels of that frame
followed by black ones, and the inpainting kinds get four mask channels in front that say which frames are given.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fw_train.batch import TEMPORAL_STRIDE, Batch
from fw_train.model.wan import WanParams

MASK_CHANNELS = TEMPORAL_STRIDE  # one for each pixel frame of a latent frame
ENCODE = {
    "latent": "fw data encode DATA --model WAN --members latent",
    "image": "fw data encode DATA --model WAN --members image",
    "clip": "fw data encode DATA --model WAN --members clip",
    "text": "fw data encode DATA --model WAN --members text",
}


def sidecar_kinds(wan: WanParams, *, online: bool) -> tuple[str, ...]:
    """The encoded members that a variant reads; online latents make those of the VAE unnecessary."""
    kinds = ["text"]
    if wan.inputs.clip:
        kinds.append("clip")
    if not online:
        kinds.append("latent")
        if wan.inputs.image_channels or wan.reference_conv:
            kinds.append("image")
    return tuple(kinds)


def complete(batch: Batch, wan: WanParams) -> Batch:
    """Adds the inputs that follow from others; one that cannot be made is an error with the command that makes it."""
    inputs, image = wan.inputs, batch.image_latents
    if inputs.clip and batch.clip is None:
        raise ValueError(_missing(wan, "clip"))
    if (inputs.image_channels or wan.reference_conv) and image is None:
        raise ValueError(_missing(wan, "image"))
    reference = None
    if wan.reference_conv and image is not None:
        reference = image[:, -batch.latents.shape[1] :, 0]
    if image is not None and inputs.image_channels > image.shape[1]:
        image = torch.cat((_first_frame_mask(image), image), dim=1)
    # No sample has a control video: zeros are what these models take for none.
    control = torch.zeros_like(batch.latents) if inputs.control_latents else None
    return replace(
        batch,
        image_latents=image if inputs.image_channels else None,
        reference_latents=reference,
        control_latents=control,
        control_camera=batch.control_camera if inputs.camera_channels else None,
    )


def _first_frame_mask(latents: Tensor) -> Tensor:
    """[B, 4, F, H/8, W/8]: 1 at the first latent frame, which is given, 0 at those to be made."""
    size, _, frames, rows, columns = latents.shape
    mask = latents.new_zeros(size, MASK_CHANNELS, frames, rows, columns)
    mask[:, :, 0] = 1
    return mask


def _missing(wan: WanParams, kind: str) -> str:
    return f"the Wan variant '{wan.variant}' needs the `{kind}` sidecar, and the data have none; make it with `{ENCODE[kind]}`"
