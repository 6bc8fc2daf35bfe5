import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fw_train.build import base_identity, build_model, initialise, load_model, on_meta, trainable_shapes
from fw_train.config import config_hash, load_config
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import assert_uniform
from fw_train.weights.files import CheckpointError
from fw_train.weights.stage import StageInfo, write_stage_weights
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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def demo(*overrides):
    return load_config("configs/demo.yaml", ["train.precision=fp32", *overrides])


def train_nothing(config, path, stage=None, step=3):
    """What a run of the configuration would write at its end, had it learned nothing."""
    model = load_model(config, "cpu")
    stage = stage or config.train.stage
    tensors = {name: model.get_parameter(name) for name in trainable_shapes(model, stage)}
    info = StageInfo(stage, step, config_hash(config), base_identity(config), torch.float32)
    write_stage_weights(path, tensors, info)
    return model


@pytest.fixture
def stages(tmp_path):
    """A base made by stage 0, and stage 1's result on it."""
    base, result = tmp_path / "stage0" / "step-3.safetensors", tmp_path / "stage1" / "step-3.safetensors"
    train_nothing(demo("train.stage=stage0"), base)
    model = train_nothing(demo(f"weights.base={base}"), result)
    return base, result, model


def test_the_stages_hand_their_weights_over(stages):
    base, result, first = stages
    second = load_model(
        demo("train.stage=stage2", f"weights.base={base}", f"weights.init_from={result}", "train.seed=9"), "cpu"
    )
    # Another seed: what is equal came through the files. Camera adapters and cross-attention are new in stage 2.
    for name in [*trainable_shapes(first, "stage1"), *(f"video.{n}" for n, _ in first.video.named_parameters())]:
        assert torch.equal(first.get_parameter(name), second.get_parameter(name)), name


def test_geometry_blocks_start_as_their_wan_blocks(stages):
    _, _, model = stages
    split = model.params.split_layer
    for pair, block in enumerate(model.geo_blocks):
        twin = model.video.blocks[split + pair]
        assert torch.equal(block.ffn[0].weight, twin.ffn[0].weight)
        assert torch.equal(block.frame_attn.q.weight, twin.self_attn.q.weight)
        assert not block.frame_attn.gate.any()


class Allocations(TorchDispatchMode):
    """Counts elements that come into being outside the meta device."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta:
            self.elements += out.numel()
        return out


def test_a_wrong_start_is_refused_before_anything_is_allocated(stages, tmp_path):
    base, result, _ = stages
    stage2 = tmp_path / "stage2.safetensors"
    train_nothing(demo("train.stage=stage2", f"weights.base={base}", f"weights.init_from={result}"), stage2)
    other = tmp_path / "other.safetensors"
    train_nothing(demo("train.stage=stage0", "train.seed=5"), other)
    for overrides, message in (
        ((f"weights.base={base}", f"weights.init_from={stage2}"), "holds the weights of stage2"),
        ((f"weights.base={base}", f"weights.init_from={base}"), "holds the weights of stage0"),
        ((f"weights.base={other}", f"weights.init_from={result}"), "was trained on the base"),
        ((f"weights.base={base}", f"weights.init_from={result}", "model.register_tokens=3"), "tokens_register"),
        ((f"weights.base={base}", f"weights.init_from={result}", "train.precision=bf16"), "of another dtype"),
        ((f"weights.base={base}", f"weights.init_from={tmp_path / 'none.safetensors'}"), "no checkpoint"),
    ):
        config = demo("train.stage=stage2", *overrides)
        base_identity(config)  # hashing the base reads it once; the cache keeps it
        with Allocations() as counted, pytest.raises(CheckpointError, match=message):
            load_model(config, "cpu")
        assert counted.elements < 1000, "nothing large may be allocated for weights that do not fit"


def test_stage_1_takes_no_weights_of_a_later_stage(stages, tmp_path):
    base, result, _ = stages
    stage2 = tmp_path / "stage2.safetensors"
    train_nothing(demo("train.stage=stage2", f"weights.base={base}", f"weights.init_from={result}"), stage2)
    for path, stage in ((result, "stage1"), (stage2, "stage2")):
        with pytest.raises(
            CheckpointError, match=f"these are the trained weights of {stage}; the base is a Wan checkpoint"
        ):
            load_model(demo(f"weights.base={path}"), "cpu")
