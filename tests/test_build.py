import pytest
import torch

from fw_train.build import build_model, initialise, on_meta
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import assert_uniform
from samples import tiny_params


def test_modules_are_built_in_the_dtype_and_the_default_comes_back():
    model = build_model(tiny_params(), torch.bfloat16)
    assert_uniform(model, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert not any(p.is_meta for p in model.parameters())


def test_weights_depend_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = build_model(tiny_params(), torch.float32, seed=5).state_dict()
    torch.manual_seed(2)
    torch.rand(7)
    again = build_model(tiny_params(), torch.float32, seed=5).state_dict()
    other = build_model(tiny_params(), torch.float32, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_camera"], other["token_camera"])


def test_building_leaves_the_callers_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    build_model(tiny_params(), torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_what_is_loaded_already_is_left_alone():
    model = on_meta(lambda: FantasyWorldModel(tiny_params()), torch.float32)
    model.video.blocks[0].self_attn.q.weight = torch.nn.Parameter(torch.full((48, 48), 7.0))
    model.video.blocks[0].self_attn.q.bias = torch.nn.Parameter(torch.full((48,), 7.0))
    initialise(model, "cpu", seed=0)
    assert model.video.blocks[0].self_attn.q.weight.unique().tolist() == [7.0]


def test_a_half_loaded_module_is_an_error_and_not_overwritten():
    model = on_meta(lambda: FantasyWorldModel(tiny_params()), torch.float32)
    model.video.blocks[0].self_attn.q.weight = torch.nn.Parameter(torch.full((48, 48), 7.0))
    with pytest.raises(ValueError, match=r"video\.blocks\.0\.self_attn\.q"):
        initialise(model, "cpu", seed=0)


def test_fresh_gates_and_adapters_are_zero_and_the_rest_is_not():
    for name, p in build_model(tiny_params("camera"), torch.float32).named_parameters():
        zero = ".gate" in name or "gamma_m" in name or "pose_adapter" in name or name.startswith("camera_adapters")
        if zero:
            assert not p.any(), name
        elif not name.endswith("bias"):
            assert p.any(), name
