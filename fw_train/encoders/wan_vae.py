"""Wan's VAE: causal in time, four frames at a time, in fp32; its latents normalised as the network takes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fw_train.batch import LATENT_CHANNELS, latent_frames
from fw_train.encoders.loading import fill, find, from_diffusers, library, renamed, shape, substitute, weights_hash
from fw_train.weights.files import open_checkpoint

FILE, SUBFOLDER = "Wan2.1_VAE.pth", "vae"

_PARTS = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}  # of a residual block
_RULES = {
    r"conv1\.(\w+)": r"quant_conv.\1",
    r"conv2\.(\w+)": r"post_quant_conv.\1",
    r"(encoder|decoder)\.conv1\.(\w+)": r"\1.conv_in.\2",
    r"(encoder|decoder)\.head\.0\.gamma": r"\1.norm_out.gamma",
    r"(encoder|decoder)\.head\.2\.(\w+)": r"\1.conv_out.\2",
    r"(encoder|decoder)\.middle\.0\.(.+)": r"\1.mid_block.resnets.0.\2",
    r"(encoder|decoder)\.middle\.1\.(.+)": r"\1.mid_block.attentions.0.\2",
    r"(encoder|decoder)\.middle\.2\.(.+)": r"\1.mid_block.resnets.1.\2",
    r"encoder\.downsamples\.(.+)": r"encoder.down_blocks.\1",
}


class WanVae:
    """See `LatentCodec`; latents are the mean of the posterior, without noise."""

    def __init__(self, vae: nn.Module, device: str | torch.device) -> None:
        config: Any = vae.config
        if config.z_dim != LATENT_CHANNELS:
            raise ValueError(
                f"this VAE has {config.z_dim} channels; Wan 2.1's has {LATENT_CHANNELS}, which the network takes"
            )
        self.fingerprint_facts: dict[str, Any] = {
            "codec": "wan_vae",
            "version": 1,
            "weights": weights_hash(vae),
            "mean": list(config.latents_mean),
            "deviation": list(config.latents_std),
        }
        self._vae: Any = vae.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)
        self._mean, self._deviation = (
            torch.tensor(numbers, device=device).view(1, -1, 1, 1, 1)
            for numbers in (config.latents_mean, config.latents_std)
        )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """fp32 [B, 3, T, H, W] in [-1, 1] to fp32 [B, 16, F, H/8, W/8]."""
        latent_frames(video.shape[2])  # refuses other lengths
        with _full_precision(self._device):
            found = self._vae.encode(video.to(self._device, torch.float32)).latent_dist.mode()
        return (found - self._mean) / self._deviation

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """fp32 [B, 16, F, H/8, W/8] to fp32 [B, 3, T, H, W] in [-1, 1]."""
        with _full_precision(self._device):
            scaled = latents.to(self._device, torch.float32) * self._deviation + self._mean
            return self._vae.decode(scaled).sample


def load_wan_vae(folder: str | Path, device: str | torch.device) -> WanVae:
    """The VAE of a Wan folder, in either layout."""
    place = find(folder, "VAE", SUBFOLDER, FILE)
    vae_class = library("diffusers").AutoencoderKLWan
    if place.is_dir():
        return WanVae(from_diffusers(vae_class, place, torch.float32), device)
    reader = open_checkpoint(place)
    vae = vae_class(base_dim=shape(reader, "encoder.conv1.weight")[0], z_dim=shape(reader, "conv2.weight")[0])
    return WanVae(fill(vae, renamed(reader, _rename), torch.float32, place), device)


def _rename(name: str) -> str:
    """The name that diffusers has for a tensor of the original file."""
    words = name.split(".")
    if words[:2] == ["decoder", "upsamples"]:  # three residual blocks and an upsampling in turn
        level, at = divmod(int(words[2]), 4)
        place = f"resnets.{at}" if at < 3 else "upsamplers.0"
        words[1:3] = ["up_blocks", str(level), place]
        name = ".".join(words)
    else:
        name = substitute(_RULES, name) or name
    before, found, after = name.partition(".residual.")
    if found:
        number, _, rest = after.partition(".")
        name = f"{before}.{_PARTS.get(number, number)}.{rest}"
    return name.replace(".shortcut.", ".conv_shortcut.")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 in convolutions, which torch allows by default."""
    with torch.autocast(device.type, enabled=False), torch.backends.cudnn.flags(benchmark=False, allow_tf32=False):
        yield
