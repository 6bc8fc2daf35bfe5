"""A small packed dataset with every kind of sidecar, whose numbers tell which sample they belong to."""

import argparse
import os

import torch
from raw_clips import write_clip, write_metadata
from sidecars import make_sidecar, noise_facts

from data_tools import pack
from fw_train.data.manifest import Dataset
from fw_train.data.shards import shard_path


def pack_arguments(raw, out, *words):
    parser = argparse.ArgumentParser()
    pack.add_arguments(parser)
    return parser.parse_args([str(word) for word in (raw, out, "--workers", 1, *words)])


def marked_tensor(kind, row, latent_shape):
    """A sidecar's tensor, every number of which is the row; texts are 2 or 3 tokens long."""
    shape = {"clip": (5, 8), "text": (2 + row % 2, 8)}.get(kind, latent_shape)
    return torch.full(shape, float(row))


def make_packed(folder, clips=((5, 32, 48, 9), (3, 48, 32, 9)), shard_size=2, kinds=("latent", "text"), words=()):
    """Packs (count, height, width, frames) clips, keys a0, a1, ... of the first entry, b0, ... of the second."""
    raw, out = folder / "raw", folder / "out"
    entries = [
        write_clip(raw, f"{letter}{number}", frames=frames, height=height, width=width, fps=8 + 8 * (number % 2))
        for letter, (count, height, width, frames) in zip("abcdef", clips, strict=False)
        for number in range(count)
    ]
    write_metadata(raw, entries)
    assert pack.run(pack_arguments(raw, out, "--shard-size", shard_size, *words)) == 0
    dataset = Dataset(out)
    for kind in kinds:
        make_sidecar(dataset, kind, noise_facts(kind), marked_tensor)
    return out


def damage_member(out, key, suffix="depth.geo"):
    """Changes a bit of a sample."""
    dataset = Dataset(out)
    place = dataset.sample(dataset.find(key))
    member = place.members[suffix]
    with open(shard_path(out, place.shard), "r+b") as file:
        file.seek(member.offset + member.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 8]))
