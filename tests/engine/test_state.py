"""The state that an engine owns: complete, exchangeable, untouched by what is skipped or discarded, and divided by ranks."""

import math

import pytest
import torch

from fw_train import dist
from fw_train.engine import EngineError
from processes import run_function
from runs import Run

ENGINES = {
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "zero0": {"kind": "deepspeed", "zero_stage": 0, "precision": "fp32"},
    "fsdp2": {"kind": "fsdp2"},
    "fsdp2_fp16": {"kind": "fsdp2", "precision": "fp16"},
}


def examine(names):
    """Everything that is asked of the state, engine by engine on the ranks of one world."""
    world = dist.start(120)
    return {name: examine_one(world, ENGINES[name]) for name in names}


def examine_one(world, settings):
    run = Run(world, stage="stage1", accumulate=2, **{"precision": "bf16", **settings})
    engine, seen = run.engine, {}
    seen["uncovered"] = uncovered(run)
    seen["equal to the model"] = all(
        torch.equal(f.master.to(run.dtype), run.initial[f.name].view(-1)[f.start : f.start + f.numel])
        for f in engine.fragments()
    )
    seen["steps"] = [engine.optimiser_steps()]
    run.train(1)
    seen["steps"].append(engine.optimiser_steps())

    # One rank's gradient is not finite: nothing changes anywhere.
    before = run.state()
    run.accumulate_gradients(1, scale=math.nan if world.rank == world.size - 1 else 1.0)
    stats = engine.step()
    seen["poisoned"] = [stats.applied, math.isfinite(stats.grad_norm), same(before, run.state())]
    seen["steps"].append(engine.optimiser_steps())
    seen["scaler"] = engine.scaler_state()

    # Dropped gradients are gone: after both backward passes, after one of two, which the next step would take along, and after
    # a forward pass whose backward pass never comes.
    run.accumulate_gradients(2, scale=50.0)
    engine.discard()
    engine.backward(run.losses(100 + world.rank).total)
    engine.discard()
    run.losses(200 + world.rank)
    engine.discard()
    seen["discarded"] = same(before, run.state())

    # The next step is that of a twin which never saw any of it: written into a fresh engine, bit by bit.
    full = {key: whole(run, key) for key in ("master", "exp_avg", "exp_avg_sq")}
    twin = Run(world, stage="stage1", accumulate=2, **{"precision": "bf16", **settings})
    with torch.no_grad():
        for f in twin.engine.fragments():
            for key in full:
                getattr(f, key).copy_(full[key][f.name][f.start : f.start + f.numel])
    twin.engine.restore(engine.optimiser_steps(), engine.scaler_state())
    seen["read back"] = same(run.state(), twin.state())
    seen["same step"] = run.train(1, first=3) == twin.train(1, first=3) and same(run.state(), twin.state())
    seen["steps"].append(twin.engine.optimiser_steps())

    # What restore hands to the parameters of all ranks is what the masters say.
    generator = torch.Generator().manual_seed(world.rank)
    with torch.no_grad():
        for f in engine.fragments():
            for view in (f.master, f.exp_avg, f.exp_avg_sq):
                view.copy_(torch.rand(view.shape, generator=generator))
    written = {f.name + str(f.start): f.master.clone() for f in raw_fragments(engine)}
    engine.restore(1234, engine.scaler_state())
    seen["random"] = [
        all(torch.equal(f.master, written[f.name + str(f.start)]) for f in engine.fragments())
        or settings.get("zero_stage") == 0,
        engine.optimiser_steps(),
    ]
    masters, weights = whole(run, "master"), engine.trainable_weights()
    seen["rounded"] = all(torch.equal(weights[name].view(-1), masters[name].to(run.dtype)) for name in weights)
    seen["forward"] = dist.all_equal(json_of(run.losses(7).total.item()))

    run.engine.discard()
    run.accumulate_gradients(5)
    seen["bytes"] = list(engine.state_bytes())
    try:
        engine.fragments()
    except EngineError as error:
        seen["in the middle"] = str(error)
    return seen


def raw_fragments(engine):
    """The fragments while parameters and masters differ, where `fragments()` rightly objects."""
    import fw_train.engine.deepspeed as module

    check, module._check_rounded = module._check_rounded, lambda *_: None
    try:
        return engine.fragments()
    finally:
        module._check_rounded = check


def json_of(value):
    return float(value).hex()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def whole(run, part):
    """Every parameter's masters or moments, put together from the fragments of all ranks."""
    full = {name: torch.zeros(p.numel()) for name, p in run.initial.items()}
    for f in run.engine.fragments():
        full[f.name][f.start : f.start + f.numel] = getattr(f, part)
    return {name: dist.all_sum(values) for name, values in full.items()}


def uncovered(run):
    """Elements that no rank owns, or several."""
    counts = {name: torch.zeros(p.numel(), dtype=torch.int32) for name, p in run.initial.items()}
    for f in run.engine.fragments():
        assert f.shape == tuple(run.initial[f.name].shape)
        assert {f.master.dtype, f.exp_avg.dtype, f.exp_avg_sq.dtype} == {torch.float32}
        counts[f.name][f.start : f.start + f.numel] += 1
    return sum(int((dist.all_sum(count) != 1).sum()) for count in counts.values())


@pytest.fixture(scope="module")
def usual():
    return run_function(examine, ["zero2", "fsdp2"], size=2, timeout_s=300)


@pytest.fixture(scope="module")
def alone():
    return run_function(examine, ["zero2", "fsdp2_fp16"], size=1, timeout_s=300)


def check(ranks, name):
    for rank in ranks:
        seen = rank[name]
        assert seen["uncovered"] == 0
        assert seen["equal to the model"]
        assert seen["steps"] == [0, 1, 1, 2]
        assert seen["poisoned"] == [False, False, True]
        assert seen["discarded"]
        assert seen["read back"]
        assert seen["same step"]
        assert seen["random"] == [True, 1234]
        assert seen["rounded"]
        assert seen["forward"]
        assert "between steps" in seen["in the middle"]


@pytest.mark.parametrize("name", ["zero2", "fsdp2"])
def test_state_on_two_ranks(usual, name):
    check(usual, name)


@pytest.mark.parametrize("name", ["zero2", "fsdp2_fp16"])
def test_state_on_one_rank(alone, name):
    check(alone, name)


def test_the_loss_scale_of_fp16_is_halved_by_an_overflow_and_restored(alone):
    assert alone[0]["fsdp2_fp16"]["scaler"] == {"loss_scale": 2.0**15, "good_steps": 0}
    assert alone[0]["zero2"]["scaler"] == {}


def test_two_ranks_of_zero_2_hold_half_of_ones_state_each(usual, alone):
    one = sum(alone[0]["zero2"]["bytes"])
    assert one >= 16 * 385_000  # master, two moments and a gradient, all fp32
    for rank in usual:
        assert sum(rank["zero2"]["bytes"]) <= 0.55 * one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero3", "fsdp2_fp16"])
def test_state_of_the_other_modes(name):
    check(run_function(examine, [name], size=2, timeout_s=300), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "fsdp2"])
def test_state_on_four_ranks(name):
    check(run_function(examine, [name], size=4, timeout_s=300), name)
