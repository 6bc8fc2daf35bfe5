"""The data of a run: its sources as the configuration names them, batches as the network takes them, clips held out."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from fw_train.batch import Batch
from fw_train.conditioning import complete, sidecar_kinds
from fw_train.config import Config, DataConfig
from fw_train.data.coded import CodedBatch
from fw_train.data.encodings import Encodings
from fw_train.data.expand import expand_batch, expand_video
from fw_train.data.loader import Augmentation, LoaderParams, SourceParams, TrainingData
from fw_train.encoders.latents import LatentCodec, first_frame_video, load_latent_codec
from fw_train.model.wan import WanParams


class Encoded(NamedTuple):
    """What the VAE makes of a video."""

    latents: Tensor  # [B, 16, F, H/8, W/8]
    image: Tensor | None  # the same of its first frame, followed by nothing


class BatchMaker:
    """Coded batches to batches with all that the Wan variant takes, on the device, in fp32."""

    def __init__(self, config: Config, wan: WanParams, device: torch.device) -> None:
        self._wan, self._device = wan, device
        self.codec: LatentCodec | None = None
        if config.data.latents == "online":
            self.codec = load_latent_codec(config.data.vae, device)

    def __call__(self, coded: CodedBatch) -> Batch:
        encoded = self._encode(coded)
        batch = expand_batch(
            coded,
            self._device,
            torch.float32,  # noise is mixed in before anything is rounded to the network's dtype
            control_camera=bool(self._wan.inputs.camera_channels),
            latents=encoded.latents if encoded else None,
        )
        if encoded:
            batch = replace(batch, image_latents=encoded.image)
        return complete(replace(batch, position=coded.position), self._wan)  # stays on the CPU, where noise is drawn

    def _encode(self, coded: CodedBatch) -> Encoded | None:
        if self.codec is None:
            return None
        video = expand_video(coded, self._device).transpose(1, 2)
        latents = self.codec.encode(video)
        wants_image = self._wan.inputs.image_channels or self._wan.reference_conv
        image = self.codec.encode(first_frame_video(video[:, :, 0], video.shape[2])) if wants_image else None
        return Encoded(latents, image)


def open_data(config: Config, wan: WanParams) -> TrainingData:
    """The mix that is trained on."""
    data = config.data
    if not data.sources:
        raise ValueError(
            "data.sources is empty; name what `fw data pack` wrote, for example data.sources=[{path: data/train}]"
        )
    sources = [SourceParams(source.path, source.weight, source.name) for source in data.sources]
    online = data.latents == "online"
    return TrainingData(sources, _params(config, wan, data, video=online, workers=data.workers), config.train.seed)


class HeldOut:
    """The same few clips every time; clip i has position i."""

    def __init__(self, config: Config, wan: WanParams, rank: int, world: int) -> None:
        params = _params(config, wan, config.data, video=True, workers=0)
        self._data = TrainingData([SourceParams(config.data.validation)], params, config.train.seed)
        self._rows = self._spread(config.run.validation_samples)
        self._rank, self._world = rank, world

    @property
    def encodings(self) -> Encodings:
        """What the clips were encoded with."""
        return self._data.encodings

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self) -> Iterator[tuple[CodedBatch, bool]]:
        """This rank's clips, one by one; ranks with fewer repeat one that does not count."""
        for first in range(0, len(self._rows), self._world):
            index = first + self._rank
            yield self.clip(min(index, len(self._rows) - 1)), index < len(self._rows)

    def clip(self, index: int) -> CodedBatch:
        source, row = self._rows[index]
        return self._data.sample_batch(source, [row], [index])

    def _spread(self, count: int) -> list[tuple[int, int]]:
        """(source, row) of up to `count` clips: of every size alike, evenly over each."""
        columns = []
        for number in range(len(self._data.streams)):
            rows = self._data.rows(number)
            share = min(len(rows), -(-count // len(self._data.streams)))
            columns.append([(self._data.source_of(number), int(rows[i * len(rows) // share])) for i in range(share)])
        turns = zip_longest(*columns)
        return [pick for turn in turns for pick in turn if pick is not None][:count]


def _params(config: Config, wan: WanParams, data: DataConfig, *, video: bool, workers: int) -> LoaderParams:
    online = data.latents == "online"
    return LoaderParams(
        frames=data.frames,
        sizes_px=data.sizes_px,
        latents=data.latents,
        members=sidecar_kinds(wan, online=online),
        labels=config.train.stage != "stage0",
        video=video,
        text_tokens=data.text_tokens,
        workers=workers,
        prefetch=data.prefetch,
        timeout_s=data.timeout_s,
        max_substituted=data.max_substituted,
        augmentation=Augmentation(data.random_crop, data.max_temporal_stride, data.flip, data.colour_jitter),
    )
