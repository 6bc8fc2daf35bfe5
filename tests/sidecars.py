"""Small packed datasets without real clips, and sidecars of noise beside them."""

import numpy as np
import torch

from fw_train.atomic_files import write_file
from fw_train.data.manifest import (
    Dataset,
    IndexHeader,
    Settings,
    ShardIndex,
    Totals,
    dataset_files,
    index_bytes,
    index_path,
    write_dataset_files,
)
from fw_train.data.schema import SUFFIXES
from fw_train.data.shards import write_tar
from fw_train.data.sidecar_files import finish_sidecar, write_shard
from fw_train.data.sidecar_tensor import KINDS, tensor_bytes

KEYS = (("a-b", "a", "b"), ("c", "d"))
BUCKETS = ("32x48x5", "64x32x9")
SHAPES = ((16, 2, 4, 6), (16, 3, 8, 4))  # of latents


def make_noise_dataset(folder, salt=b""):
    """A dataset of two buckets whose members are noise."""
    folder.mkdir(exist_ok=True)
    rng, indexes = np.random.default_rng(0), []
    for number, (keys, bucket) in enumerate(zip(KEYS, BUCKETS, strict=True)):
        name = f"shard-{number:06}"
        samples = [(key, {suffix: rng.bytes(40) + salt for suffix in SUFFIXES}) for key in keys]
        with open(folder / f"{name}.tar", "wb") as file:
            tar = write_tar(file, samples)
        settings, totals = Settings("default", None, 128), Totals(samples=len(keys))
        header = IndexHeader(1, name, bucket, "plan", settings, tar.bytes, tar.sha256, 0, totals)
        indexes.append(ShardIndex(header, tar.samples, ()))
        write_file(index_path(folder, name), index_bytes(indexes[-1]))
    write_dataset_files(folder, dataset_files(indexes))
    return Dataset(folder)


def noise_facts(kind, **changes):
    places = {"size": "native", "frames": "native"} if kind in ("image", "latent") else {}
    return {"encoder": "noise", **places, **changes}


def noise_tensor(kind, seed, latent_shape=SHAPES[0]):
    generator = torch.Generator().manual_seed(seed)
    shape = {"clip": (5, 8), "text": (2 + seed % 3, 8)}.get(kind, latent_shape)
    return torch.randn(shape, generator=generator).to(torch.bfloat16).float()


def make_sidecar(dataset, kind, facts=None, tensor=noise_tensor):
    """Writes a sidecar; the tensor of row r is `tensor(kind, r, latent_shape)`."""
    facts = facts or noise_facts(kind)
    folder = dataset.folder / kind
    for line in dataset.manifest.shards:
        height, width, frames = map(int, line.bucket.split("x"))
        latent = (16, (frames - 1) // 4 + 1, height // 8, width // 8)
        rows = range(line.first, line.first + line.totals.samples)
        samples = [(dataset.sample(row).key, tensor(kind, row, latent)) for row in rows]
        write_shard(folder, kind, line, facts, samples)
    empty = tensor_bytes("text", noise_tensor("text", 99), "empty") if kind == "text" else None
    finish_sidecar(folder, kind, dataset.manifest, empty)


def make_all_sidecars(folder):
    dataset = make_noise_dataset(folder)
    for kind in KINDS:
        make_sidecar(dataset, kind)
    return dataset
