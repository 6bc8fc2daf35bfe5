"""The best constant prediction: every clip gets the mean labels of the training clips of its size.

It is the bar that a network has to clear to have learnt anything from what it sees.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fw_train.batch import Batch, Prediction
from fw_train.build import world_params
from fw_train.config import Config
from fw_train.run.data import BatchMaker, open_data


class Size(NamedTuple):
    """Of labels."""

    frames: int
    height: int
    width: int


class MeanLabels:
    """The mean labels of the clips of one size; pixels that no clip has valid are 1 far and at the origin."""

    def __init__(self, size: Size) -> None:
        frames, height, width = size
        shapes = {
            "depth": (frames, height, width),
            "points": (frames, 3, height, width),
            "valid": (frames, height, width),
            "pose9": (frames, 9),
            "clips": (),
        }
        self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def add(self, batch: Batch) -> None:
        """Counts one clip."""
        assert batch.depth is not None
        assert batch.points is not None
        assert batch.valid is not None
        assert batch.pose9 is not None
        valid = batch.valid[0]
        self._sums["depth"] += torch.where(valid, batch.depth[0], 0)
        self._sums["points"] += torch.where(valid[:, None], batch.points[0], 0)
        self._sums["valid"] += valid
        self._sums["pose9"] += batch.pose9[0]
        self._sums["clips"] += 1

    def share(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Adds up what the ranks have counted."""
        self._sums = {name: all_sum(value) for name, value in self._sums.items()}

    def prediction(self) -> Prediction | None:
        """The means as a prediction of one clip; None where no clip was counted."""
        sums, seen = self._sums, self._sums["valid"].clamp_min(1)
        if not sums["clips"]:
            return None
        depth = torch.where(sums["valid"] > 0, sums["depth"] / seen, 1).float()
        points = (sums["points"] / seen[:, None]).float()
        cameras = (sums["pose9"] / sums["clips"]).float()
        return Prediction(None, depth[None], points[None], torch.ones_like(depth)[None], cameras[None])


def mean_labels(
    config: Config,
    clips: int | None,
    *,
    rank: int,
    world: int,
    all_sum: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None],
) -> dict[Size, Prediction]:
    """The constant prediction for each size, from about `clips` training clips spread evenly (None: from all)."""
    wan = world_params(config).wan
    make_batch = BatchMaker(config, wan, torch.device("cpu"))
    data = open_data(config, wan)
    chosen = []
    for stream in range(len(data.streams)):
        rows = data.rows(stream)
        step = 1 if clips is None else max(1, len(rows) * len(data.streams) // clips)
        chosen += [(data.source_of(stream), int(row)) for row in rows[::step]]
    means = {size: MeanLabels(size) for size in (Size(config.data.frames, *size) for size in config.data.sizes_px)}
    own = chosen[rank::world]
    for done, (source, row) in enumerate(own):
        progress(done, len(own))
        batch = make_batch(data.sample_batch(source, [row], [0]))
        means[size_of(batch)].add(batch)
    for labels in means.values():
        labels.share(all_sum)
    found = {size: labels.prediction() for size, labels in means.items()}
    return {size: prediction for size, prediction in found.items() if prediction is not None}


def constant_for(means: dict[Size, Prediction], batch: Batch) -> Prediction:
    """What the constant says about a clip, on its device."""
    size = size_of(batch)
    if size not in means:
        raise ValueError(
            f"no training clip has the size {tuple(size)} (frames, height, width) of the held-out clip {batch.keys[0]}"
        )
    return Prediction(*(None if part is None else part.to(batch.latents.device) for part in means[size]))


def size_of(batch: Batch) -> Size:
    assert batch.depth is not None
    return Size(*batch.depth.shape[1:])
