"""First frames to the features that image-to-video networks attend to: CLIP's visual tower, before its last block.

Axes: B batch, L = 257 tokens, D = 1280 features.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fw_train.encoders.loading import fill, find, from_diffusers, library, renamed, shape, substitute, weights_hash
from fw_train.weights.files import CheckpointReader, open_checkpoint

FILE, SUBFOLDER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "image_encoder"
HEAD_WIDTH = 80  # of ViT-H
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_RULES = {
    r"visual\.cls_embedding": "embeddings.class_embedding",
    r"visual\.pos_embedding": "embeddings.position_embedding.weight",
    r"visual\.patch_embedding\.weight": "embeddings.patch_embedding.weight",
    r"visual\.pre_norm\.(\w+)": r"pre_layrnorm.\1",
    r"visual\.post_norm\.(\w+)": r"post_layernorm.\1",
    r"visual\.transformer\.(\d+)\.norm([12])\.(\w+)": r"encoder.layers.\1.layer_norm\2.\3",
    r"visual\.transformer\.(\d+)\.attn\.to_qkv\.(\w+)": r"encoder.layers.\1.self_attn.qkv.\2",
    r"visual\.transformer\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layers.\1.self_attn.out_proj.\2",
    r"visual\.transformer\.(\d+)\.mlp\.0\.(\w+)": r"encoder.layers.\1.mlp.fc1.\2",
    r"visual\.transformer\.(\d+)\.mlp\.2\.(\w+)": r"encoder.layers.\1.mlp.fc2.\2",
}


class ImageEncoder(Protocol):
    fingerprint_facts: dict[str, Any]  # what decides the numbers

    def encode(self, frames: Tensor) -> Tensor:
        """fp32 [B, 3, H, W] in [-1, 1] to [B, 257, 1280]; no autograd."""
        ...


class ClipEncoder:
    """See `ImageEncoder`. Frames are stretched to a square, as the original of Wan does it, and not cropped."""

    def __init__(self, model: Any, device: str | torch.device) -> None:
        self.fingerprint_facts: dict[str, Any] = {
            "encoder": "clip",
            "version": 1,
            "weights": weights_hash(model),
            "features": "second last block",
            "square": "stretched bicubic",
        }
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self._side: int = self._model.config.image_size
        self._mean, self._deviation = (torch.tensor(rgb, device=device).view(3, 1, 1) for rgb in (MEAN, DEVIATION))
        self._device = torch.device(device)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """fp32 [B, 3, H, W] in [-1, 1] to fp32 [B, L, D]."""
        square = interpolate(
            frames.to(self._device).float(), (self._side, self._side), mode="bicubic", align_corners=False
        )
        pixels = (square / 2 + 0.5 - self._mean) / self._deviation
        with torch.autocast(self._device.type, enabled=False):
            return self._model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


def load_image_encoder(folder: str | Path, device: str | torch.device = "cpu") -> ImageEncoder:
    """The CLIP of a Wan image-to-video folder, in either layout."""
    place = find(folder, "image encoder", SUBFOLDER, FILE)
    transformers = library("transformers")
    if place.is_dir():
        return ClipEncoder(from_diffusers(transformers.CLIPVisionModel, place, torch.float32), device)
    return ClipEncoder(_from_original(transformers, open_checkpoint(place)), device)


def _from_original(transformers: Any, reader: CheckpointReader) -> nn.Module:
    """The visual tower in the sizes of the original file, which also holds a text tower."""
    width, _, patch, _ = shape(reader, "visual.patch_embedding.weight")
    tokens = shape(reader, "visual.pos_embedding")[-2]
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shape(reader, "visual.transformer.0.mlp.0.weight")[0],
        num_hidden_layers=len([n for n in reader.shapes() if n.startswith("visual.") and n.endswith("to_qkv.weight")]),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round((tokens - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
    )
    model = transformers.CLIPVisionModel(config)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in model.state_dict()) else ""
    tensors: dict[str, Tensor] = {}
    for name, tensor in renamed(reader, lambda name: substitute(_RULES, name)).items():
        if ".qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                tensors[prefix + name.replace(".qkv.", f".{part}_proj.")] = third.contiguous()
        elif name.endswith("class_embedding"):
            tensors[prefix + name] = tensor.flatten()
        elif name.endswith("position_embedding.weight"):
            tensors[prefix + name] = tensor.flatten(0, -2)
        else:
            tensors[prefix + name] = tensor
    return fill(model, tensors, torch.float32, reader.path)
