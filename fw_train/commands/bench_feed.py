"""What a benchmark of training is fed with: the data of the configuration, or one random batch over and over."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fw_train.batch import Batch
from fw_train.build import world_params
from fw_train.commands.bench_model import random_batch
from fw_train.config import Config
from fw_train.data.order import Segment
from fw_train.dist import World
from fw_train.run.data import BatchMaker, open_data

ENDLESS = 1_000_000_000  # steps; a benchmark stops when it has seen enough


class Feed(NamedTuple):
    """Micro-batches of this rank without end."""

    empty_text: Tensor  # [L, D]
    coded: Iterator[Any]  # as they come from the loader
    expand: Callable[[Any], Batch]
    close: Callable[[], None]  # ends the loader's processes


def data_feed(config: Config, world: World) -> Feed:
    """What the trainer would read from `data.sources`, in its order."""
    wan = world_params(config).wan
    data = open_data(config, wan)
    if data.empty_text is None:
        raise ValueError("the data have no texts; make them with `fw data encode`, or use --synthetic-batch")
    batches = data.batches(
        (Segment(0, config.train.global_batch),), 0, ENDLESS,
        rank=world.rank, world=world.size, micro_batch=config.train.micro_batch,
    )  # fmt: skip
    return Feed(data.empty_text.to(world.device), batches, BatchMaker(config, wan, world.device), batches.close)


def synthetic_feed(config: Config, world: World) -> Feed:
    """One random batch of the first size, with labels, already on the device."""
    batch = labelled_batch(config, world)
    return Feed(torch.zeros_like(batch.text[0]), repeat(batch), lambda batch: batch, lambda: None)


def labelled_batch(config: Config, world: World) -> Batch:
    """Random inputs and labels in fp32, as a `BatchMaker` gives them; every rank draws positions of its own."""
    size, frames = config.train.micro_batch, config.data.frames
    height, width = config.data.sizes_px[0]
    inputs = random_batch(config, world.device, config.data.text_tokens).to(world.device, torch.float32)
    generator = torch.Generator().manual_seed(config.train.seed)
    labels = Batch(
        latents=inputs.latents,
        text=inputs.text,
        depth=1 + torch.rand(size, frames, height, width, generator=generator),
        valid=torch.ones(size, frames, height, width, dtype=torch.bool),
        points=torch.randn(size, frames, 3, height, width, generator=generator),
    ).to(world.device)
    return replace(
        inputs,
        timestep=None,
        depth=labels.depth,
        valid=labels.valid,
        points=labels.points,
        position=torch.arange(size) + world.rank * size,  # on the CPU, where noise is drawn
    )
