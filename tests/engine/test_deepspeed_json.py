"""The configuration that DeepSpeed gets."""

from dataclasses import replace

import pytest
import torch

from fw_train.dist import World
from fw_train.engine import EngineError, EngineParams
from fw_train.engine.deepspeed import deepspeed_json

PARAMS = EngineParams(kind="deepspeed", precision="bf16", micro_batch=2, accumulate=4, learning_rate=1e-5)
CPU = World(0, 8, 0, 8, torch.device("cpu"))


def test_everything_that_a_default_could_change_is_said():
    config = deepspeed_json(PARAMS, CPU)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 1.0
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    assert config["zero_optimization"]["stage"] == 2
    assert "optimizer" not in config  # DeepSpeed's own would be compiled at run time
    assert "scheduler" not in config


def test_communication_overlaps_on_gpu_alone():
    assert not deepspeed_json(PARAMS, CPU)["zero_optimization"]["overlap_comm"]
    gpu = CPU._replace(device=torch.device("cuda", 0))
    assert deepspeed_json(PARAMS, gpu)["zero_optimization"]["overlap_comm"]


def test_fp32_has_no_section_of_half_precision():
    assert not {"bf16", "fp16"} & deepspeed_json(replace(PARAMS, precision="fp32", zero_stage=0), CPU).keys()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"precision": "fp16"}, "use the engine fsdp2"),
        ({"zero_stage": 0}, "use zero_stage 1, 2 or 3"),
        ({"zero_stage": 4}, "stages 0, 1, 2 and 3"),
        ({"cpu_offload": True}, "belongs to the engine fsdp2"),
    ],
)
def test_what_deepspeed_cannot_run_is_refused_with_a_remedy(changes, remedy):
    with pytest.raises(EngineError, match=remedy):
        deepspeed_json(replace(PARAMS, **changes), CPU)
