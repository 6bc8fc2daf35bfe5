import logging
import re

import pytest
import torch

from fw_train.build import on_meta
from fw_train.model.world import FantasyWorldModel
from fw_train.stages import Rule, apply_stage, count_rules, match_rules, stage_rules
from samples import tiny_params


@pytest.fixture(scope="module")
def model():
    return on_meta(lambda: FantasyWorldModel(tiny_params("camera")), torch.float32)


def roots(groups):
    return {name.split(".")[0] for group in groups for name in group.parameters}


GEOMETRY = {
    "latent_bridge", "geo_blocks", "token_camera", "tokens_register", "pose_enc", "head_depth", "head_point", "head_camera",
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "trains"),
    [("stage0", {"video"}), ("stage1", GEOMETRY), ("stage2", GEOMETRY | {"camera_adapters", "irg_cross_attns"})],
)
def test_what_trains_in_each_stage(model, stage, trains):
    groups = apply_stage(model, stage_rules(stage))
    assert roots(groups) == trains
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for group in groups for name in group.parameters}
    assert trainable == {name for name, _ in model.named_parameters() if name.split(".")[0] in trains}


def test_gates_have_their_own_rate_and_no_decay(model):
    groups = apply_stage(model, stage_rules("stage2", gate_lr_scale=10))
    for group in groups:
        for name in group.parameters:
            gate = name.endswith(".gate") or re.search(r"gamma_m[12]$", name)
            assert (group.lr_scale == 10) == bool(gate), name
            assert group.weight_decay != (bool(gate) or name.startswith("token")), name


def test_the_letter_of_the_schedule_is_one_rate_for_all(model):
    assert {group.lr_scale for group in apply_stage(model, stage_rules("stage2"))} == {1.0}


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"1 parameters match no stage rule: new_module\.weight"):
        match_rules(["video.x", "new_module.weight"], [Rule(r"video\..*", trainable=False)])


def test_a_rule_without_a_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"match no parameter \(any more\): renamed"):
        match_rules(["video.x"], [Rule(r"video\..*", trainable=False), Rule(r"renamed\..*", trainable=True)])


def test_a_pattern_must_cover_the_whole_name():
    with pytest.raises(ValueError, match="video_extra"):
        match_rules(["video.x", "video_extra"], [Rule(r"video\..", trainable=False)])


def test_the_table_of_counts_adds_up_and_is_logged(model, caplog):
    counts = count_rules(model, stage_rules("stage1"))
    assert sum(count.parameters for count in counts) == sum(p.numel() for p in model.parameters())
    assert sum(count.tensors for count in counts) == len(list(model.parameters()))
    with caplog.at_level(logging.INFO):
        apply_stage(model, stage_rules("stage1"))
    assert sum("frozen" in line for line in caplog.messages) == 3
    assert any(r"frame_attn\.gate" in line and "decay off" in line for line in caplog.messages)


def test_an_unknown_stage_is_an_error():
    with pytest.raises(ValueError, match="no stage `stage3`; there are stage0, stage1, stage2"):
        stage_rules("stage3")
