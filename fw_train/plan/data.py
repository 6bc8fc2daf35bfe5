"""What a sample brings from the disk: from the dataset where it is there, else from what the codec was measured to need."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fw_train.batch import LATENT_CHANNELS, SPATIAL_STRIDE, latent_frames
from fw_train.build import world_params
from fw_train.conditioning import sidecar_kinds
from fw_train.config import Config
from fw_train.data.manifest import MANIFEST, read_manifest
from fw_train.data.sidecar_files import read_manifest as read_sidecar_manifest

# docs/benchmarks.md, "Data": depth and points of an 81x336x592 clip in the default preset.
MEASURED_PIXELS = 81 * 336 * 592
LABEL_BYTES = 3.47e6 + 3.48e6
VIDEO_BYTES = 1.7e6  # not measured: 4 Mbit/s at 24 frames a second
CLIP_BYTES = 257 * 1280 * 2
TEXT_FILL = 0.2  # of data.text_tokens that a caption has: a hundred of 512


class DataPlan(NamedTuple):
    """Bytes of a sample, and where the figures come from."""

    label_bytes: float  # depth and points; cameras and descriptions are thousandths of them
    video_bytes: float  # 0 unless latents are encoded while training
    sidecar_bytes: float
    samples: int | None  # of all sources; None: the data are not here
    source: str

    @property
    def sample_bytes(self) -> float:
        return self.label_bytes + self.video_bytes + self.sidecar_bytes


def data_plan(config: Config) -> DataPlan:
    """What a sample costs to read, averaged over the sources that are there, weighted as they are drawn."""
    wan = world_params(config).wan
    online = config.data.latents == "online"
    kinds = sidecar_kinds(wan, online=online)
    here = [source for source in config.data.sources if (Path(source.path) / MANIFEST).is_file()]
    if not here:
        return _expected(config, kinds, online)
    labels, videos, sidecars, samples = [], [], [], 0
    for source in here:
        totals = read_manifest(Path(source.path)).totals
        encoded = 0 if config.train.stage == "stage0" else totals.depth.encoded_bytes + totals.points.encoded_bytes
        labels.append(encoded / totals.samples)
        videos.append(totals.video_bytes / totals.samples if online else 0.0)
        sidecars.append(sum(_sidecar_bytes(Path(source.path) / kind, kind) for kind in kinds) / totals.samples)
        samples += totals.samples
    weights = [source.weight for source in here]
    label, video, sidecar = (float(np.average(column, weights=weights)) for column in (labels, videos, sidecars))
    return DataPlan(label, video, sidecar, samples, ", ".join(source.path for source in here))


def _sidecar_bytes(folder: Path, kind: str) -> int:
    return sum(line.tar_bytes for line in read_sidecar_manifest(folder, kind).shards)


def _expected(config: Config, kinds: Sequence[str], online: bool) -> DataPlan:
    frames, m = config.data.frames, config.model
    sizes = config.data.sizes_px
    pixels = sum(frames * height * width for height, width in sizes) / len(sizes)
    latent_bytes = 2 * LATENT_CHANNELS * latent_frames(frames) * pixels / frames / SPATIAL_STRIDE**2
    of_kind = {
        "text": 2 * m.text_dim * config.data.text_tokens * TEXT_FILL,
        "clip": CLIP_BYTES,
        "latent": latent_bytes,
        "image": latent_bytes,
    }
    scale = pixels / MEASURED_PIXELS
    labels = 0.0 if config.train.stage == "stage0" else scale * LABEL_BYTES
    return DataPlan(
        labels,
        scale * VIDEO_BYTES if online else 0.0,
        sum(of_kind[kind] for kind in kinds),
        None,
        "docs/benchmarks.md: the data are not here",
    )
