"""The loaders that ours is measured against: plain `webdataset` on the same tars, and folders of npy files.

Both hand over what ours does, as far as they have it: webdataset the same codes and planes, npy float32 labels and the planes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fw_train.camera_files import read_cameras
from fw_train.data import schema
from fw_train.data.codec import decode_codes
from fw_train.data.codec_torch import as_tensors
from fw_train.data.shards import shard_path
from fw_train.data.video import decode_video


def webdataset_batches(
    out: Path, shards: list[str], frames: int, workers: int, prefetch: int
) -> Iterator[list[Tensor]]:
    """Samples of the tars, over and over, read in sequence."""
    tars = [str(shard_path(out, shard)) for shard in shards]
    # Each process needs a tar of its own, and more of them whenever it comes to the end.
    urls = tars * max(1, 1000 // len(tars)) * max(1, workers)
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(_Decoded(frames))
    yield from _loaded(samples, workers, prefetch)


class _Decoded:
    """The members of a webdataset sample as tensors."""

    def __init__(self, frames: int) -> None:
        self._frames = frames

    def __call__(self, sample: dict[str, Any]) -> list[Tensor]:
        frames = range(self._frames)
        info = schema.parse_info(sample[schema.INFO], sample["__key__"])
        cameras = schema.parse_cameras(sample[schema.CAMERA], info.frames, sample["__key__"])
        labels = [as_tensors(decode_codes(sample[suffix], frames)) for suffix in (schema.DEPTH, schema.POINTS)]
        return tensors_of((*labels, decode_video(sample[schema.VIDEO], frames), cameras))


def npy_batches(raw: Path, keys: list[str], frames: int, workers: int, prefetch: int) -> Iterator[list[Tensor]]:
    """Clips of a raw folder, over and over."""
    yield from _loaded(_NpyClips(raw, keys, frames), workers, prefetch)


class _NpyClips(Dataset[list[Tensor]]):
    """A raw folder as most training code reads it: one file for each frame and kind of label."""

    def __init__(self, raw: Path, keys: list[str], frames: int) -> None:
        self._raw, self._keys, self._frames = raw, keys, frames

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, number: int) -> list[Tensor]:
        key = self._keys[number % len(self._keys)]
        labels = [
            np.stack(
                [np.load(schema.label_folder(self._raw, kind, key) / f"frame_{t:04}.npy") for t in range(self._frames)]
            )
            for kind in ("depth", "points")
        ]
        video = decode_video(schema.video_path(self._raw, key).read_bytes(), range(self._frames))
        cameras = read_cameras(schema.camera_path(self._raw, key))
        return tensors_of((*map(torch.from_numpy, labels), video, cameras))


def _loaded(samples: Any, workers: int, prefetch: int) -> Iterator[list[Tensor]]:
    ahead = prefetch if workers else None
    yield from DataLoader(
        samples, batch_size=None, num_workers=workers, prefetch_factor=ahead, worker_init_fn=_one_thread
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, tuple | list) else []
