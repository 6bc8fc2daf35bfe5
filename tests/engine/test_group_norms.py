"""The gradient's norm by module group: every engine tells the same, and the squares add up to the whole norm's."""

import pytest
import torch

from fw_train import dist
from fw_train.engine.group_norms import group_of, norms_by_group
from processes import run_function
from runs import Run

GROUPS = {
    "video", "latent_bridge", "geo_blocks", "pose_enc", "head_depth", "head_point", "head_camera", "camera_adapters",
    "irg_cross_attns", "tokens",
}  # fmt: skip
ENGINES = {
    "zero0": {"kind": "deepspeed", "zero_stage": 0, "precision": "fp32"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1, "precision": "fp32"},
    "zero2": {"kind": "deepspeed", "zero_stage": 2, "precision": "fp32"},
    "fsdp2": {"kind": "fsdp2", "precision": "fp32"},
    "zero1_bf16": {"kind": "deepspeed", "zero_stage": 1, "precision": "bf16"},
    "zero2_bf16": {"kind": "deepspeed", "zero_stage": 2, "precision": "bf16"},
    "zero3_bf16": {"kind": "deepspeed", "zero_stage": 3, "precision": "bf16"},
    "fsdp2_bf16": {"kind": "fsdp2", "precision": "bf16"},
    "fsdp2_fp16": {"kind": "fsdp2", "precision": "fp16"},
}
USUAL = ["zero2_bf16", "fsdp2_bf16", "fsdp2_fp16"]
OTHERS = [["zero0", "zero1", "zero2", "fsdp2"], ["zero1_bf16", "zero2_bf16", "zero3_bf16"]]


def norms(names):
    """Whole norm and group norms of the same two micro-batches under every engine, then a step that is not asked."""
    world = dist.start(120)
    outcome = {}
    for name in names:
        run = Run(world, stage="stage2", accumulate=2, **ENGINES[name])
        run.accumulate_gradients(0)
        stats = run.engine.step(group_norms=True)
        outcome[name] = [stats.grad_norm, stats.group_norms]
        run.accumulate_gradients(1)
        outcome[f"{name}, not asked"] = run.engine.step().group_norms
    return outcome


def check(ranks, names, tolerance):
    """Against the first engine of the list."""
    _, expected = ranks[0][names[0]]
    assert len(expected) == 9
    assert set(expected) <= GROUPS
    for name in names:
        whole, groups = ranks[0][name]
        assert ranks[1][name] == [whole, groups]
        assert groups == pytest.approx(expected, rel=tolerance), name
        assert sum(norm**2 for norm in groups.values()) == pytest.approx(whole**2, rel=1e-5), name


@pytest.fixture(scope="module")
def usual():
    return run_function(norms, USUAL, size=2, timeout_s=300)


def test_both_engines_tell_the_same_and_the_squares_add_up(usual):
    check(usual, USUAL[:2], tolerance=1e-2)


def test_the_loss_scale_of_fp16_is_not_in_them(usual):
    check(usual, ["fsdp2_fp16"], tolerance=0)
    assert usual[0]["fsdp2_fp16"][1] == pytest.approx(usual[0]["zero2_bf16"][1], rel=0.5)  # the scale is 65536


@pytest.mark.slow
@pytest.mark.parametrize("names", OTHERS, ids=["fp32", "bf16"])
def test_every_stage_and_precision_tells_the_same(names):
    check(run_function(norms, names, size=2, timeout_s=300), names, tolerance=1e-4 if names[0] == "zero0" else 1e-2)


def test_only_a_step_that_is_asked_tells(usual):
    assert [usual[0][f"{name}, not asked"] for name in USUAL] == [{}, {}, {}]


def test_groups_are_named_by_the_first_component_and_tokens_are_one():
    assert group_of("geo_blocks.0.attn.q.weight") == "geo_blocks"
    assert group_of("token_camera") == group_of("tokens_register") == "tokens"


def test_a_rank_without_a_piece_names_all_groups():
    names = ["head_depth.a", "token_camera", "video.b"]
    pieces = [("head_depth.a", torch.tensor(3.0)), ("head_depth.a", torch.tensor(4.0))]
    assert norms_by_group(names, pieces, lambda total: total) == {"head_depth": 5.0, "tokens": 0.0, "video": 0.0}
    assert norms_by_group(names, [], lambda total: total + 4) == {"head_depth": 2.0, "tokens": 2.0, "video": 2.0}
