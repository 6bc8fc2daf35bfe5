"""A global batch is the same, whether ranks or accumulation steps make it up."""

import pytest

from fw_train import dist
from processes import run_function
from runs import Run

GLOBAL_BATCH = 8


def train(kinds, steps):
    world = dist.start(120)
    outcome = {}
    for kind in kinds:
        run = Run(world, kind, "stage1", "fp32", accumulate=GLOBAL_BATCH // world.size)
        outcome[kind] = run.train(steps)
    return outcome


def whole_steps(ranks, kind):
    """Losses, and the sorted positions of each step over all ranks."""
    losses = ranks[0][kind][0]
    assert all(rank[kind][0] == losses for rank in ranks)
    steps = zip(*(rank[kind][2] for rank in ranks), strict=True)
    return losses, [sorted(p for positions in step for p in positions) for step in steps]


def compare(kinds, sizes, steps):
    outcomes = {size: run_function(train, kinds, steps, size=size, timeout_s=300) for size in sizes}
    for kind in kinds:
        losses, positions = whole_steps(outcomes[1], kind)
        assert positions == [list(range(8 * k, 8 * k + 8)) for k in range(steps)]
        assert max(losses) - min(losses) > 0.1, "something is learnt, so that a difference would show"
        for size in sizes[1:]:
            other_losses, other_positions = whole_steps(outcomes[size], kind)
            assert other_positions == positions
            assert other_losses == pytest.approx(losses, rel=1e-5)


def test_1x8_and_2x4_train_alike():
    compare(["deepspeed"], [1, 2], steps=4)


@pytest.mark.slow
def test_1x8_2x4_and_4x2_train_alike_under_both_engines():
    compare(["deepspeed", "fsdp2"], [1, 2, 4], steps=10)
