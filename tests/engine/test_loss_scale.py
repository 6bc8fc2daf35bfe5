"""The dynamic loss scale of fp16."""

from fw_train.engine.loss_scale import GROWTH_STEPS, SMALLEST, LossScale


def test_an_overflow_halves_it_and_many_good_steps_double_it():
    scale = LossScale(8.0)
    scale.update(finite=False)
    assert scale == LossScale(4.0, 0)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(finite=True)
    assert scale == LossScale(4.0, GROWTH_STEPS - 1)
    assert LossScale.from_state(scale.state()) == scale
    scale.update(finite=True)
    assert scale == LossScale(8.0, 0)


def test_it_never_vanishes():
    scale = LossScale(SMALLEST)
    scale.update(finite=False)
    assert scale.value == SMALLEST
