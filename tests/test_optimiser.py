import pytest
import torch

from fw_train.build import build_model
from fw_train.optimiser import learning_rate, make_optimiser, set_learning_rate
from fw_train.stages import apply_stage, gate_magnitudes, stage_rules
from samples import tiny_params


def rates(count, **changes):
    settings = {"peak": 1e-5, "warmup_steps": 0, "total_steps": 10, "schedule": "constant"} | changes
    return [learning_rate(step, **settings) for step in range(count)]


def test_the_first_step_runs_at_the_configured_rate():
    """A common library's default starts at a third of it."""
    assert rates(3) == [1e-5] * 3
    assert rates(1, schedule="cosine") == [1e-5]


def test_a_warm_up_rises_to_the_full_rate_and_stays():
    assert rates(6, warmup_steps=4) == pytest.approx([0.25e-5, 0.5e-5, 0.75e-5, 1e-5, 1e-5, 1e-5])


def test_a_cosine_falls_to_zero_at_the_end_and_not_below():
    values = rates(13, warmup_steps=2, schedule="cosine")
    assert values[1:3] == [1e-5, 1e-5]
    assert values[6] == pytest.approx(0.5e-5)
    assert values[10:] == pytest.approx([0, 0, 0], abs=1e-20)
    assert values[2:11] == sorted(values[2:11], reverse=True)


def groups(stage="stage2", gate_lr_scale=10):
    model = build_model(tiny_params("t2v", interaction=True), torch.float32)
    return model, apply_stage(model, stage_rules(stage, gate_lr_scale))


def train(optimiser, model, steps, accumulate, first=0):
    """Rates seen by the optimiser in a loop of `accumulate` micro-batches a step."""
    seen = []
    for step in range(first, first + steps):
        for _ in range(accumulate):
            sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
        rate = learning_rate(step, peak=1e-3, warmup_steps=4, total_steps=8, schedule="cosine")
        set_learning_rate(optimiser, rate)
        seen.append(optimiser.param_groups[-1]["lr"])
        optimiser.step()
        optimiser.zero_grad()
    return seen


def test_the_rate_follows_optimiser_steps_not_micro_batches_and_survives_a_restart():
    model, parts = groups()
    whole = train(make_optimiser(parts, 1e-3, 0.01), model, 8, accumulate=1)
    accumulated = train(make_optimiser(parts, 1e-3, 0.01), model, 8, accumulate=4)
    first = train(make_optimiser(parts, 1e-3, 0.01), model, 3, accumulate=2)
    second = train(make_optimiser(parts, 1e-3, 0.01), model, 2, accumulate=2, first=3)
    third = train(make_optimiser(parts, 1e-3, 0.01), model, 3, accumulate=2, first=5)
    assert whole == accumulated == first + second + third


def test_every_trainable_parameter_is_optimised_once_with_its_own_rate_and_decay():
    model, parts = groups()
    optimiser = make_optimiser(parts, 1e-5, 0.01)
    names = {id(p): name for name, p in model.named_parameters()}
    optimised = [names[id(p)] for group in optimiser.param_groups for p in group["params"]]
    assert sorted(optimised) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    for group in optimiser.param_groups:
        gates = all(names[id(p)].endswith((".gate", "gamma_m1", "gamma_m2")) for p in group["params"])
        tokens = all(names[id(p)].startswith("token") for p in group["params"])
        assert group["lr"] == pytest.approx(1e-4 if gates else 1e-5)
        assert group["weight_decay"] == (0.0 if gates or tokens else 0.01)


def test_gates_open_faster_with_their_own_rate_and_their_size_is_known():
    sizes = {}
    for scale in (1, 10):
        model, parts = groups(gate_lr_scale=scale)
        assert set(gate_magnitudes(model).values()) == {0.0}
        train(make_optimiser(parts, 1e-3, 0.01), model, 4, accumulate=1)
        sizes[scale] = gate_magnitudes(model)
    assert sizes[1].keys() == {f"geo_blocks.{i}.frame_attn.gate" for i in range(4)} | {
        f"irg_cross_attns.{i}.gamma_m{m}" for i in range(4) for m in (1, 2)
    }
    for name, size in sizes[1].items():
        assert sizes[10][name] == pytest.approx(10 * size, rel=1e-3)
