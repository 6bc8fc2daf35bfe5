"""Captions to the tensors that the network attends to.

Axes: L tokens, D features.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fw_train.encoders.umt5 import MAX_TOKENS, load_umt5

_WORD = re.compile(r"\w+")
_HASH = re.compile(r"hash:([1-9]\d{0,4})")


class TextEncoder(Protocol):
    fingerprint_facts: dict[str, Any]  # what decides the numbers

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """[L, D] of each text, L its own number of tokens, at least 1; no autograd."""
        ...


class HashEncoder:
    """Text without weights: a word is a vector of mean square 1 that follows from its letters, no text is a word too."""

    def __init__(self, features: int) -> None:
        self.fingerprint_facts: dict[str, Any] = {"encoder": f"hash:{features}", "version": 2}
        self._features = features

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """fp32 [L, D] of each text; L is its number of words."""
        return [torch.stack([self._vector(w) for w in _words(text)[:MAX_TOKENS]]) for text in texts]

    def _vector(self, word: str) -> Tensor:
        key = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        counted = (hashlib.blake2b(key, salt=n.to_bytes(4, "little")).digest() for n in range(-(-self._features // 16)))
        uniform = np.frombuffer(b"".join(counted), "<u4")[: self._features] / 2.0**32 - 0.5
        return torch.from_numpy((uniform / np.sqrt(np.square(uniform).mean())).astype(np.float32))


def load_text_encoder(name_or_folder: str | Path, device: str | torch.device = "cpu") -> TextEncoder:
    """`hash:D` for D features without weights, or a Wan folder with its UMT5."""
    match = _HASH.fullmatch(str(name_or_folder))
    if match:
        return HashEncoder(int(match[1]))
    if str(name_or_folder).startswith("hash"):
        raise ValueError(f"{name_or_folder}: text without weights is hash:D, as hash:64 for 64 features")
    return load_umt5(name_or_folder, device)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower()) or [""]
