"""The constant prediction is the mean of the training clips, whoever has counted them."""

import pytest
import torch
from tiny_training import make_data, write_config

from fw_train.batch import Batch
from fw_train.config import load_config
from fw_train.evaluation.constant import MeanLabels, Size, constant_for, mean_labels


def labels(depth, valid, pose):
    depth = torch.tensor(depth).view(1, 1, 1, -1)
    return Batch(
        latents=torch.zeros(1), text=torch.zeros(1), depth=depth, valid=torch.tensor(valid).view(1, 1, 1, -1),
        points=depth[:, :, None].expand(-1, -1, 3, -1, -1) * 10, pose9=torch.full((1, 1, 9), pose), keys=("a",),
    )  # fmt: skip


CLIPS = (
    labels([1.0, 2.0, float("nan")], [True, True, False], 0.5),
    labels([3.0, 99.0, 7.0], [True, False, False], 1.5),
)


def test_the_constant_is_the_mean_over_the_clips_that_have_the_pixel():
    means = MeanLabels(Size(1, 1, 3))
    for clip in CLIPS:
        means.add(clip)
    constant = means.prediction()
    assert constant.depth.flatten().tolist() == [2.0, 2.0, 1.0]
    assert constant.points[0, 0, 0].flatten().tolist() == [20.0, 20.0, 0.0]
    assert constant.cameras.flatten().tolist() == [1.0] * 9


def test_ranks_add_up():
    alone, ranks = MeanLabels(Size(1, 1, 3)), [MeanLabels(Size(1, 1, 3)) for _ in CLIPS]
    for clip, own in zip(CLIPS, ranks, strict=True):
        alone.add(clip)
        own.add(clip)
    shares = []
    ranks[1].share(lambda value: shares.append(value) or value)
    ranks[0].share(lambda value: value + shares.pop(0))
    for ours, theirs in zip(ranks[0].prediction()[1:], alone.prediction()[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_a_size_that_nobody_trained_on_is_an_error():
    assert MeanLabels(Size(1, 1, 3)).prediction() is None
    with pytest.raises(ValueError, match=r"no training clip has the size \(1, 1, 3\)"):
        constant_for({}, CLIPS[0])


def test_every_nth_clip_is_counted(tmp_path, monkeypatch):
    config = load_config(write_config(tmp_path / "c.yaml", make_data(tmp_path, clips=6), tmp_path / "out"))
    counted, steps = [], []
    add = MeanLabels.add
    monkeypatch.setattr(MeanLabels, "add", lambda self, batch: counted.append(batch.keys[0]) or add(self, batch))

    def means(clips):
        return mean_labels(
            config, clips, rank=0, world=1, all_sum=lambda value: value, progress=lambda *at: steps.append(at)
        )

    (size,) = means(None)
    assert size == (5, 32, 48)
    assert counted == [f"clip{number:02}" for number in range(6)]
    assert steps == [(done, 6) for done in range(6)]
    counted.clear()
    means(3)
    assert counted == ["clip00", "clip02", "clip04"]
