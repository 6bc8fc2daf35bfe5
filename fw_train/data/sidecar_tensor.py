"""The one tensor of a sidecar member: its dtype, shape and bytes.

Axes: F latent frames, H x W pixels, L text tokens, D features.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fw_train.batch import LATENT_CHANNELS, SPATIAL_STRIDE, latent_frames
from fw_train.data.schema import SIDECAR_SUFFIXES, Bucket
from fw_train.data.shards import ShardError

KINDS = tuple(suffix.split(".")[0] for suffix in SIDECAR_SUFFIXES)  # names of folders, and of the tensors

LATENT_KINDS = ("image", "latent")
RESIZE = "cover-centre-area"  # data/transform.py: the largest centred window, scaled with antialiasing

# Latents of about unit variance lose 8 times less in fp16 than in bf16, in the same space; the text encoder's output is bf16.
DTYPES = {"clip": torch.float16, "image": torch.float16, "latent": torch.float16, "text": torch.bfloat16}

_EXPONENT = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # all of its bits are set in NaN and infinity


def suffix_of(kind: str) -> str:
    """The suffix of a kind's members."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r:.40} is no kind of sidecar; there are {', '.join(KINDS)}")
    return f"{kind}.safetensors"


def tensor_bytes(kind: str, tensor: Tensor, where: str) -> bytes:
    """A member: the tensor in the dtype that its kind is stored in, the only cast it sees before training."""
    stored = tensor.detach().cpu().to(DTYPES[kind]).contiguous()
    check_tensor(kind, stored, where)
    return safetensors.torch.save({kind: stored})


def parse_tensor(kind: str, data: bytes, where: str) -> Tensor:
    """Undoes `tensor_bytes`, with dtype, shape and every value checked."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise ShardError(f"{where} is no safetensors file: {error}") from None
    if list(tensors) != [kind]:
        raise ShardError(f"{where} holds {sorted(tensors)!r:.100} instead of the one tensor `{kind}`")
    check_tensor(kind, tensors[kind], where)
    return tensors[kind]


def check_tensor(kind: str, tensor: Tensor, where: str) -> None:
    """Refuses another dtype, an impossible shape, NaN and infinity."""
    dimensions = 4 if kind in LATENT_KINDS else 2
    fits = tensor.ndim == dimensions and tensor.numel() > 0 and (dimensions == 2 or len(tensor) == LATENT_CHANNELS)
    if not fits or tensor.dtype != DTYPES[kind]:
        wanted = f"[{LATENT_CHANNELS}, F, H/8, W/8]" if dimensions == 4 else "[L, D]"
        raise ShardError(f"{where} is {tensor.dtype} {list(tensor.shape)}; {DTYPES[kind]} {wanted} is needed")
    bits = tensor.view(torch.int16).numpy().view(np.uint16)  # a tenth of the time that torch takes with halves
    if ((bits & _EXPONENT[tensor.dtype]) == _EXPONENT[tensor.dtype]).any():
        raise ShardError(f"{where} holds NaN or infinity")


def sidecar_facts(
    kind: str, encoder: Mapping[str, Any], size: tuple[int, int] | None = None, frames: int | None = None
) -> dict[str, Any]:
    """What decides the numbers of a sidecar: the encoder's facts, and how clips are brought to it; None leaves them as they are."""
    facts = {**encoder, "dtype": str(DTYPES[kind]).removeprefix("torch.")}
    if kind != "text":
        facts |= {"size": "native" if size is None else list(size), "resize": RESIZE}
    if kind in LATENT_KINDS:
        facts |= {"frames": "native" if frames is None else frames}
    if kind == "image":
        facts |= {"video": "first frame, then zeros"}
    return facts


def latent_shape(facts: Mapping[str, Any], bucket: Bucket) -> tuple[int, int, int, int]:
    """Shape of a sample's latents: as its bucket, unless the facts name a size or a length."""
    try:
        height, width = bucket[:2] if facts["size"] == "native" else facts["size"]
        frames = latent_frames(bucket.frames if facts["frames"] == "native" else facts["frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(f"size and frames of the facts {dict(facts)!r:.200} are no shape: {error!r}") from None
    return LATENT_CHANNELS, frames, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE
