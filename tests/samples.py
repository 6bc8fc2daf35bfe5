"""Small networks and batches that the tests share."""

import torch

from fw_train.batch import Batch, latent_frames
from fw_train.model.heads import DenseHeadParams
from fw_train.model.wan import WanParams
from fw_train.model.world import WorldParams


def tiny_wan(variant="t2v", dim=48, heads=2, layers=6, **changes):
    return WanParams(
        variant=variant,
        dim=dim,
        ffn_dim=80,
        heads=heads,
        layers=layers,
        text_dim=32,
        clip_dim=40,
        freq_dim=32,
        **changes,
    )


def tiny_params(variant="t2v", interaction=False, **wan_changes):
    return WorldParams(
        wan=tiny_wan(variant, **wan_changes),
        head=DenseHeadParams(wan_changes.get("dim", 48), features=16, channels=(16, 24, 32, 32), chunk_frames=2),
        interaction=interaction,
        split_layer=2,
        bridge_heads=2,
        cross_width=72,
        cross_heads=2,
        taps=(0, 1, 2, 3),
    )


def make_batch(
    wan, frames=5, height=32, width=48, size=1, text_tokens=7, dtype=torch.float32, device="cpu", seed=0, clip_tokens=7
):
    """A noisy batch with every input that the variant takes."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, kind=dtype):
        if device == "meta":
            return torch.empty(*shape, dtype=kind, device="meta")
        return torch.randn(*shape, generator=generator).to(kind)

    latent = latent_frames(frames)
    space = (height // 8, width // 8)
    inputs = wan.inputs
    timestep = random(size, kind=torch.float32)
    return Batch(
        latents=random(size, 16, latent, *space),
        text=random(size, text_tokens, wan.text_dim),
        timestep=timestep if device == "meta" else timestep.abs() * 300,
        clip=random(size, clip_tokens if device != "meta" else 257, wan.clip_dim) if inputs.clip else None,
        image_latents=random(size, inputs.image_channels, latent, *space) if inputs.image_channels else None,
        control_latents=random(size, 16, latent, *space) if inputs.control_latents else None,
        reference_latents=random(size, 16, *space) if wan.reference_conv else None,
        control_camera=random(size, inputs.camera_channels, latent, height, width) if inputs.camera_channels else None,
        pose9=random(size, frames, 9, kind=torch.float32),
    )
