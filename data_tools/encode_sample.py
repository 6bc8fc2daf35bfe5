"""What one kind of sidecar holds of one sample.

Axes: T frames, H x W pixels.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from fw_train.data import schema
from fw_train.data.manifest import Dataset
from fw_train.data.schema import SampleInfo
from fw_train.data.shards import ShardError
from fw_train.data.transform import cover_crop, resize_video
from fw_train.data.video import VideoError, VideoFrames, decode_video, to_rgb
from fw_train.encoders.clip import load_image_encoder
from fw_train.encoders.latents import first_frame_video, load_latent_codec
from fw_train.encoders.text import load_text_encoder

_LOADERS: dict[str, Callable[[str, str], Any]] = {
    "clip": load_image_encoder,
    "image": load_latent_codec,
    "latent": load_latent_codec,
    "text": load_text_encoder,
}


class Recipe(NamedTuple):
    """How a kind is made; None leaves size and frames as the clips have them."""

    kind: str
    encoder: str  # its name or folder
    device: str
    size: tuple[int, int] | None
    frames: int | None


def load_encoder(recipe: Recipe) -> Any:
    """The encoder of a recipe; a process holds the last one, since text encoders fill a GPU."""
    return _load(_LOADERS[recipe.kind], recipe.encoder, recipe.device)


@lru_cache(maxsize=1)
def _load(loader: Callable[[str, str], Any], encoder: str, device: str) -> Any:
    return loader(encoder, device)


def encode_sample(recipe: Recipe, dataset: Dataset, row: int) -> Tensor:
    """The tensor of a sample, without a batch axis."""
    key = dataset.sample(row).key
    encoder = load_encoder(recipe)
    wanted = (schema.INFO,) if recipe.kind == "text" else (schema.INFO, schema.VIDEO)
    members = dataset.read(row, wanted)
    info = schema.parse_info(members[schema.INFO], f"{key}.{schema.INFO}")
    if recipe.kind == "text":
        return encoder.encode([info.caption])[0]
    frames = recipe.frames or info.frames
    try:
        pixels = _pixels(members[schema.VIDEO], info, recipe, frames if recipe.kind == "latent" else 1)
    except VideoError as error:
        raise ShardError(f"{dataset.folder}: {key}.{schema.VIDEO} {error}") from None
    if recipe.kind == "clip":
        return encoder.encode(pixels[:1])[0]
    video = pixels.transpose(0, 1)[None] if recipe.kind == "latent" else first_frame_video(pixels[:1], frames)
    return encoder.encode(video)[0]


def _pixels(video: bytes, info: SampleInfo, recipe: Recipe, frames: int) -> Tensor:
    """fp32 [T, 3, H, W] in [-1, 1]: the first frames, at the recipe's size."""
    crop = cover_crop(info.height, info.width, *(recipe.size or (info.height, info.width)))
    planes = decode_video(video, range(frames), None if crop.keeps_all else crop.window)
    on_device = VideoFrames(*(part.to(recipe.device) for part in planes))
    return resize_video(to_rgb(on_device), crop)
