"""Wan's text encoder: UMT5 in bf16, texts of up to 512 tokens, without padding.

Axes: L tokens, D features.
"""

import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fw_train.encoders.loading import fill, find, from_diffusers, library, renamed, shape, substitute, weights_hash
from fw_train.weights.files import CheckpointReader, open_checkpoint

FILE, SUBFOLDER = "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"
TOKENISERS = ("google/umt5-xxl", "tokenizer")  # original, diffusers
TOKENISER_FILES = ("tokenizer.json", "spiece.model")
MAX_TOKENS = 512

_RULES = {
    r"token_embedding\.weight": "shared.weight",
    r"norm\.weight": "encoder.final_layer_norm.weight",
    r"blocks\.(\d+)\.norm1\.weight": r"encoder.block.\1.layer.0.layer_norm.weight",
    r"blocks\.(\d+)\.norm2\.weight": r"encoder.block.\1.layer.1.layer_norm.weight",
    r"blocks\.(\d+)\.attn\.([qkvo])\.weight": r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
    r"blocks\.(\d+)\.pos_embedding\.embedding\.weight": (
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    r"blocks\.(\d+)\.ffn\.gate\.0\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    r"blocks\.(\d+)\.ffn\.fc1\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight",
    r"blocks\.(\d+)\.ffn\.fc2\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wo.weight",
}


class Umt5Encoder:
    """See `TextEncoder`. Texts go through one by one, so a text's numbers do not depend on its neighbours' lengths."""

    def __init__(self, model: nn.Module, tokeniser: Any, tokeniser_hash: str, device: str | torch.device) -> None:
        self.fingerprint_facts: dict[str, Any] = {
            "encoder": "umt5",
            "version": 1,
            "weights": weights_hash(model),
            "tokeniser": tokeniser_hash,
            "max_tokens": MAX_TOKENS,
        }
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self._tokeniser, self._device = tokeniser, device

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """bf16 [L, D] of each text."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Tensor:
        tokens = self._tokeniser(clean(text), truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        ids = tokens.input_ids.to(self._device)
        return self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


def clean(text: str) -> str:
    """A caption as Wan reads it: HTML's escapes undone, white space as single blanks."""
    return " ".join(html.unescape(html.unescape(text)).split())


def load_umt5(folder: str | Path, device: str | torch.device) -> Umt5Encoder:
    """The text encoder of a Wan folder, in either layout."""
    place = find(folder, "text encoder", SUBFOLDER, FILE)
    transformers = library("transformers")
    tokenisers = [place.parent / name for name in TOKENISERS if (place.parent / name).is_dir()]
    files = [path for name in TOKENISER_FILES for path in (t / name for t in tokenisers) if path.is_file()]
    if not files:
        raise ValueError(
            f"{place.parent} has no tokeniser: {' or '.join(TOKENISERS)} with {' or '.join(TOKENISER_FILES)}"
        )
    tokeniser = transformers.AutoTokenizer.from_pretrained(files[0].parent, local_files_only=True)
    tokeniser_hash = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if place.is_dir():
        model = from_diffusers(transformers.UMT5EncoderModel, place, torch.bfloat16)
    else:
        model = _from_original(transformers, open_checkpoint(place))
    return Umt5Encoder(model, tokeniser, tokeniser_hash, device)


def _from_original(transformers: Any, reader: CheckpointReader) -> nn.Module:
    """UMT5 in the sizes of the original file."""
    vocabulary, width = shape(reader, "token_embedding.weight")
    buckets, heads = shape(reader, "blocks.0.pos_embedding.embedding.weight")
    config = transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shape(reader, "blocks.0.attn.q.weight")[0] // heads,
        d_ff=shape(reader, "blocks.0.ffn.fc1.weight")[0],
        num_layers=len([name for name in reader.shapes() if name.endswith(".attn.q.weight")]),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    tensors = renamed(reader, lambda name: substitute(_RULES, name) or name)
    if "shared.weight" in tensors:  # one tensor under two names
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    return fill(model, tensors, torch.bfloat16, reader.path)
