"""Weights of each stage, found with their configuration and checked against their base."""

import pytest
import torch
from safetensors.torch import load_file
from trained_stages import trained

from fw_train.build import world_params
from fw_train.config import ConfigError, load_config
from fw_train.inference import load_trained
from fw_train.weights.files import CheckpointError
from fw_train.weights.stage import StageInfo, write_stage_weights
from samples import make_batch


def run_of(folder, stage, **weights):
    """What a run of `stage` leaves: its weights by their names in the network, and its configuration."""
    path = trained(folder, stage, **weights)
    prefix = "video." if stage == "stage0" else ""
    tensors = {prefix + key: tensor for key, tensor in load_file(path).items()}
    return path, tensors, load_config(folder / "config.yaml")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    base = run_of(folder / "zero", "stage0")
    one = run_of(folder / "one", "stage1", base=base[0])
    two = run_of(folder / "two", "stage2", base=base[0], init_from=one[0])
    return {"stage0": base, "stage1": one, "stage2": two}


@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_a_network_holds_the_weights_of_its_stage_on_those_of_the_base(stages, stage):
    path, tensors, config = stages[stage]
    model, found, info = load_trained(path)
    own = dict(model.named_parameters())
    expected = {**stages["stage0"][1], **tensors}
    fresh = {name.split(".")[0] for name in own if name not in expected}
    assert fresh.isdisjoint(
        {"stage0": {"video"}, "stage1": {"video", "geo_blocks"}, "stage2": {name.split(".")[0] for name in own}}[stage]
    )
    for name, value in expected.items():
        assert torch.equal(own[name], value), name
    assert info.step == 3
    assert found.train == config.train
    assert world_params(found) == world_params(config)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in own.values())


def test_another_precision_rounds_the_weights_once(stages):
    path, tensors, _ = stages["stage1"]
    own = dict(load_trained(path, precision="bf16").model.named_parameters())
    assert {value.dtype for value in own.values()} == {torch.bfloat16}
    assert all(torch.equal(own[name], value.bfloat16()) for name, value in tensors.items())


def test_a_network_answers(stages):
    model, config, _ = load_trained(stages["stage1"][0])
    batch = make_batch(world_params(config).wan)
    assert model(batch, velocity=False, geometry=True).cameras.shape[-1] == 9


def test_a_path_may_hold_what_means_something_in_yaml(stages, tmp_path):
    odd = tmp_path / "a: [b] # c"
    odd.mkdir()
    for name in ("step-3.safetensors", "config.yaml"):
        (odd / name).write_bytes((stages["stage2"][0].parent / name).read_bytes())
    assert load_trained(odd / "step-3.safetensors").config.weights.init_from == str(odd / "step-3.safetensors")


def test_weights_without_a_configuration_ask_for_it(stages, tmp_path):
    alone = tmp_path / "step-3.safetensors"
    alone.write_bytes(stages["stage1"][0].read_bytes())
    with pytest.raises(ConfigError, match=r"no .*config\.yaml: say how step-3\.safetensors was trained with --config"):
        load_trained(alone)
    assert load_trained(alone, config=stages["stage1"][0].parent / "config.yaml").info.stage == "stage1"


def test_another_base_is_refused(stages, tmp_path):
    other = run_of(tmp_path / "other", "stage0")
    changed = tmp_path / "changed.safetensors"
    info = StageInfo("stage0", 4, "0" * 16, "fresh weights of seed 0", torch.float32)
    write_stage_weights(changed, {name: value + 1 for name, value in other[1].items()}, info)
    with pytest.raises(CheckpointError, match="give the base that it was trained on"):
        load_trained(stages["stage1"][0], overrides=[f"weights.base={changed}"])
