"""Latents and texts of noise beside a packed dataset: what a measurement reads where no encoder has run."""

import os
from pathlib import Path

import torch

from fw_train.data.manifest import Dataset
from fw_train.data.schema import Bucket
from fw_train.data.sidecar_files import finish_sidecar, write_shard
from fw_train.data.sidecar_tensor import tensor_bytes

NOISE_KINDS = ("latent", "text")
TEXT = 96, 4096  # tokens of a usual caption, features


def with_noise_sidecars(out: Path, folder: Path) -> Dataset:
    """A dataset in an empty folder, of links to another's files, with both sidecars."""
    for path in out.iterdir():
        if path.is_file():
            os.link(path, folder / path.name)
    dataset = Dataset(folder)
    generator = torch.Generator().manual_seed(0)
    for kind in NOISE_KINDS:
        facts = {"encoder": "noise", "size": "native", "frames": "native"}
        for line in dataset.manifest.shards:
            height, width, frames = Bucket.parse(line.bucket)
            shape = TEXT if kind == "text" else (16, (frames - 1) // 4 + 1, height // 8, width // 8)
            rows = range(line.first, line.first + line.totals.samples)
            samples = ((dataset.sample(row).key, torch.randn(shape, generator=generator)) for row in rows)
            write_shard(folder / kind, kind, line, facts, samples)
        empty = tensor_bytes("text", torch.zeros(1, TEXT[1]), "empty") if kind == "text" else None
        finish_sidecar(folder / kind, kind, dataset.manifest, empty)
    return dataset
