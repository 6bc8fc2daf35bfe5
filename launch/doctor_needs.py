"""What a configuration needs of the machines: room for checkpoints, and memory."""

from typing import NamedTuple

from fw_train.build import on_meta, trainable_shapes, world_params
from fw_train.config import Config
from fw_train.data.fetch import LABEL_BYTES, SIDECAR_BYTES
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import PRECISIONS


class Needs(NamedTuple):
    save_bytes: int  # of one save: masters, both moments, and the weights for the next stage
    kept: int  # saves that stay
    state_bytes: int  # host memory that all ranks together need for a save in the background
    loader_bytes: int  # host memory of one rank's loader processes


def needs_of(config: Config) -> Needs:
    """Nothing is allocated."""
    precision = PRECISIONS[config.train.precision]
    model = on_meta(lambda: FantasyWorldModel(world_params(config)), precision.params)
    shapes = trainable_shapes(model, config.train.stage).values()
    trained = sum(_elements(info.shape) for info in shapes)
    state = trained * 3 * precision.master.itemsize
    return Needs(state + trained * precision.params.itemsize, config.run.keep_last, state, _loader_bytes(config))


def _loader_bytes(config: Config) -> int:
    """The slots in which loader processes hand over batches, all full, as `fw_train.data.fetch` measures them."""
    data = config.data
    pixels = data.frames * max(height * width for height, width in data.sizes_px)
    labels = pixels * LABEL_BYTES if config.train.stage != "stage0" else 0
    video = 2 * pixels if data.latents == "online" else 0
    slots = data.workers * data.prefetch + 2
    return slots * config.train.micro_batch * (labels + video + SIDECAR_BYTES)


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
