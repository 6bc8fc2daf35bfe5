"""Recomputation changes what is kept, never what is computed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fw_train.activation_checkpointing import apply_activation_checkpointing
from fw_train.build import build_model
from fw_train.stages import apply_stage, stage_rules
from samples import make_batch, tiny_params

MODES = ("none", "selective", "full")


class CountAttention(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        self.calls += name.startswith("aten::_scaled_dot_product") and "backward" not in name
        return op(*args, **(kwargs or {}))


def run(stage, mode, dtype=torch.float32):
    """Outputs, gradients, and how often attention was computed forward and while going backward."""
    model = build_model(tiny_params("camera", interaction=stage == "stage2"), dtype)
    apply_stage(model, stage_rules(stage))
    for name, p in model.named_parameters():
        if "gate" in name or "gamma" in name:
            torch.nn.init.constant_(p, 0.3)
    apply_activation_checkpointing(model.shard_units(), mode)
    batch = make_batch(model.params.wan, frames=9, dtype=dtype)
    with CountAttention() as forward:
        prediction = model(batch, velocity=stage != "stage1")
    outputs = [x for x in prediction if x is not None]
    with CountAttention() as backward:
        sum(x.square().mean() for x in outputs if x.requires_grad).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], gradients, forward.calls, backward.calls


@pytest.fixture(scope="module", params=["stage1", "stage2"])
def runs(request):
    return {mode: run(request.param, mode) for mode in MODES}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_outputs_and_gradients_are_the_same_bit_for_bit(runs, mode):
    outputs, gradients, *_ = runs["none"]
    other_outputs, other_gradients, *_ = runs[mode]
    assert all(torch.equal(a, b) for a, b in zip(outputs, other_outputs, strict=True))
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


def test_each_mode_recomputes_what_it_says(runs):
    forward = runs["none"][2]
    trained = runs["full"][3]
    assert forward > 0
    assert runs["none"][3] == 0
    assert runs["selective"][3] == 0, "selective keeps what attention returned"
    assert 0 < trained <= forward


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_bf16_gradients_agree(stage, mode):
    """The same kernels run on the same numbers: equality is expected, 1e-2 of the largest is what is promised."""
    _, gradients, *_ = run(stage, "none", torch.bfloat16)
    _, other, *_ = run(stage, mode, torch.bfloat16)
    for name, gradient in gradients.items():
        largest = gradient.abs().max()
        assert (gradient - other[name]).abs().max() <= 1e-2 * largest, name


def test_parameter_names_stay():
    model = build_model(tiny_params(), torch.float32)
    names = [name for name, _ in model.named_parameters()]
    apply_activation_checkpointing(model.shard_units(), "full")
    assert [name for name, _ in model.named_parameters()] == names


def test_the_rotary_tables_are_arguments_of_every_checkpointed_block(monkeypatch):
    """Made inside, they would be computed again in every backward pass, or worse, differ between the paths."""
    from fw_train.model import wan, world

    made = []
    for module in (wan, world):
        table = module.rope_table
        monkeypatch.setattr(module, "rope_table", lambda *a, table=table: made.append(a) or table(*a))
    model = build_model(tiny_params("t2v", interaction=True), torch.float32)
    apply_activation_checkpointing(model.shard_units(), "full")
    model(make_batch(model.params.wan)).depth.mean().backward()
    assert len(made) == 2, "one table for the blocks, one for the cross-attention, once per forward pass"


def test_an_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="there are none, selective, full"):
        apply_activation_checkpointing([], "partial")


@pytest.mark.parametrize("mode", MODES)
def test_torch_compile_sees_through_recomputation(mode):
    """A wrapper that the compiler skips would leave everything inside it uncompiled, without a word."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build_model(tiny_params("t2v"), torch.float32)
    block = next(unit for unit in model.shard_units() if unit.name == "geo_blocks.0")
    batch = make_batch(model.params.wan)
    model(batch, velocity=False).depth.mean().backward()
    expected = model.geo_blocks[0].self_attn.q.weight.grad.clone()
    model.zero_grad()
    apply_activation_checkpointing([block], mode)
    block.module.compile(backend="aot_eager", fullgraph=True)
    model(batch, velocity=False).depth.mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(model.geo_blocks[0].self_attn.q.weight.grad, expected, atol=1e-6, rtol=1e-4)
