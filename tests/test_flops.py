"""The hand-derived FLOPs against PyTorch's own counter, on the meta device."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fw_train.build import on_meta
from fw_train.flops import Shape, peak_flops, sample_flops, total_flops
from fw_train.model.world import FantasyWorldModel
from fw_train.stages import apply_stage, stage_rules
from samples import make_batch, tiny_params

SHAPE = Shape(frames=9, height_px=48, width_px=80, text_tokens=11)


def counted(params, stage, velocity):
    model = on_meta(lambda: FantasyWorldModel(params), torch.float32)
    apply_stage(model, stage_rules(stage))
    batch = make_batch(params.wan, frames=9, height=48, width=80, text_tokens=11, device="meta")
    with FlopCounterMode(display=False) as forward:
        prediction = model(batch, velocity=velocity, geometry=stage != "stage0")
    with FlopCounterMode(display=False) as backward:
        sum(value.sum() for value in prediction if value is not None and value.requires_grad).backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("variant", ["t2v", "camera", "control"])
@pytest.mark.parametrize(
    ("stage", "velocity"), [("stage0", True), ("stage1", False), ("stage1", True), ("stage2", True)]
)
def test_the_formula_agrees_with_the_counter(variant, stage, velocity):
    params = tiny_params(variant, interaction=stage == "stage2", reference_conv=variant == "control")
    parts = sample_flops(params, SHAPE, stage, velocity)
    forward, backward = counted(params, stage, velocity)
    assert sum(part.forward for part in parts) == pytest.approx(forward, rel=1e-3)
    assert sum(part.backward for part in parts) == pytest.approx(backward, rel=1e-3)


def test_the_known_totals_of_the_real_model():
    """0.24 PF in stage 1 and 0.59 PF in stage 2 for 81 frames of 336x592, heads aside."""
    from fw_train.build import world_params
    from fw_train.config import load_config

    for name, petaflops in (("stage1", 0.24), ("stage2", 0.59)):
        params = world_params(load_config(f"configs/{name}.yaml"))
        parts = sample_flops(params, Shape(81, 336, 592), name, velocity=name == "stage2")
        body = [part for part in parts if part.name not in ("depth head", "point head", "camera head")]
        assert total_flops(body) / 1e15 == pytest.approx(petaflops, abs=0.005)


def test_the_peak_of_a_device_is_found_by_its_name():
    assert peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("Some CPU") is None
