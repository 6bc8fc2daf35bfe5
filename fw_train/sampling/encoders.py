"""The encoders that a run's data were made with: what a prompt, a first frame or finished latents have to go through.

A packed dataset knows what its sidecars were made with, so encoders without weights need no option; those of a Wan model are
read from its folder and must be the same ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fw_train.config import Config
from fw_train.data.manifest import MANIFEST, Dataset
from fw_train.data.sidecar import Sidecar, read_empty_text
from fw_train.data.sidecar_files import difference
from fw_train.data.sidecar_tensor import DTYPES, parse_tensor
from fw_train.encoders.clip import ImageEncoder, load_image_encoder
from fw_train.encoders.latents import LatentCodec, load_latent_codec
from fw_train.encoders.text import TextEncoder, load_text_encoder

WAN_NAMES = {"codec": "wan_vae", "encoder": "umt5"}  # in the facts of sidecars, those with weights in a Wan folder


class EncoderChoice(NamedTuple):
    """What the command line says; None: as the run's data were encoded."""

    model: Path | None = None  # Wan folder
    codec: str | None = None  # `dct`
    text: str | None = None  # `hash:D`
    data: Path | None = None  # a dataset of the run


class RunEncoders:
    """Loads each encoder when it is asked for."""

    def __init__(self, config: Config, choice: EncoderChoice, device: str | torch.device) -> None:
        self._config, self._choice, self._device = config, choice, device
        self._dataset = _dataset(config, choice.data)

    def latents(self) -> LatentCodec:
        data = self._config.data
        known = data.vae if data.latents == "online" else None
        if self._choice.codec or known:
            return load_latent_codec(self._choice.codec or str(known), self._device)
        facts = self._facts("latent")
        name = self._named(facts, "codec", "latents", "--codec dct")
        codec = load_latent_codec(name, self._device)
        self._check("latent", codec.fingerprint_facts, facts)
        return codec

    def text(self) -> TextEncoder:
        if self._choice.text:
            return load_text_encoder(self._choice.text, self._device)
        facts = self._facts("text")
        encoder = load_text_encoder(self._named(facts, "encoder", "prompts", "--text-encoder hash:D"), self._device)
        self._check("text", encoder.fingerprint_facts, facts)
        return encoder

    def image(self) -> ImageEncoder:
        folder = self._wan_folder()
        if folder is None:
            raise ValueError(
                "the first frame goes through the image encoder of the Wan model; give its folder with --model DIR"
            )
        return load_image_encoder(folder, self._device)

    def texts(self, prompt: str | None) -> tuple[Tensor, Tensor]:
        """Embeddings [L, D] of a prompt and of the empty one, which None stands for too; the encoder is let go again."""
        stored = None
        if self._dataset is not None and not self._choice.text:
            stored = read_empty_text(self._dataset).float()
        if prompt is None and stored is not None:
            return stored, stored
        encoder = self.text()
        return _embedded(encoder, prompt or ""), _embedded(encoder, "") if stored is None else stored

    def _facts(self, kind: str) -> Mapping[str, Any]:
        return Sidecar(self._dataset, kind).facts if self._dataset is not None else {}

    def _named(self, facts: Mapping[str, Any], role: str, what: str, option: str) -> str:
        """The encoder by these facts: its name, or the folder where its weights lie."""
        name = facts.get(role)
        if name is not None and name not in WAN_NAMES.values():
            return str(name)
        folder = self._wan_folder()
        if folder is not None:
            return str(folder)
        made_by = f"were encoded by {name} in this run" if name else "could be encoded in several ways"
        remedy = (
            "--model DIR" if name else f"--model DIR, or {option} where the run's data were encoded without weights"
        )
        raise ValueError(f"{what} {made_by}: give the Wan folder that holds the encoder with {remedy}")

    def _wan_folder(self) -> Path | None:
        if self._choice.model is not None:
            return self._choice.model
        base = Path(self._config.weights.base)
        return base if self._config.weights.base and base.is_dir() else None

    def _check(self, kind: str, wanted: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        found = {name: value for name, value in facts.items() if name in wanted}
        if facts and found != dict(wanted):
            raise ValueError(
                f"the encoder for `{kind}` is not the one of the run's data ({difference(wanted, found)}); give the Wan "
                "folder that they were encoded with as --model DIR, or an embedding of the run as --text FILE"
            )


def cached_text(path: Path) -> Tensor:
    """The embedding [L, D] of a `text.safetensors`, as `fw data encode` writes them."""
    if not path.is_file():
        raise ValueError(f"no cached embedding {path}; give a file with the one tensor `text` [L, D], or --prompt TEXT")
    return parse_tensor("text", path.read_bytes(), str(path)).float()


def _dataset(config: Config, given: Path | None) -> Dataset | None:
    """The dataset that is named, or the first of the run's that is still there."""
    if given is not None:
        return Dataset(given)
    places = [config.data.validation, *(source.path for source in config.data.sources)]
    return next((Dataset(place) for place in places if place and (Path(place) / MANIFEST).is_file()), None)


def _embedded(encoder: TextEncoder, prompt: str) -> Tensor:
    """Rounded as the embeddings that the network was trained on."""
    return encoder.encode([prompt])[0].to(DTYPES["text"]).float().cpu()
