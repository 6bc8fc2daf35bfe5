"""`fw bench model` runs and prints what it says; nothing here judges a time."""

import re

import pytest

from fw_train.cli import main

SMALL = [
    "data.frames=5",
    "data.sizes_px=[[32,32]]",
    "train.micro_batch=1",
    "train.precision=fp32",
    "--repeats",
    "2",
    "--device",
    "cpu",
]


def test_every_checkpointing_mode_is_timed_and_the_flops_agree(capsys):
    assert main(["bench", "model", "configs/demo.yaml", "--modes", "none,selective,full", *SMALL]) == 0
    out = capsys.readouterr().out
    by_hand, counted = re.search(r"([\d.]+) T by formula, ([\d.]+) T counted", out).groups()
    assert float(by_hand) == pytest.approx(float(counted), rel=2e-3)
    assert all(re.search(rf"^{mode} +[\d.]+ s", out, re.MULTILINE) for mode in ("none", "selective", "full"))


def test_stage_1_keeps_less_for_the_backward_pass_than_the_whole_graph(capsys):
    assert main(["bench", "model", "configs/demo.yaml", "--against", "whole-graph", *SMALL]) == 0
    ours, whole = (float(x) for x in re.findall(r"([\d.]+) MiB", capsys.readouterr().out))
    assert ours < whole


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
def test_diffusers_computes_the_same_velocity_from_the_same_weights(capsys, variant):
    arguments = ["train.stage=stage0", f"model.variant={variant}", "model.clip_dim=1280"]
    assert main(["bench", "model", "configs/demo.yaml", "--against", "diffusers", *SMALL, *arguments]) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"largest difference of the outputs: ([\d.e-]+)", out).group(1)) < 2e-4
    assert "ratio" in out


def test_wrong_wishes_are_errors(capsys):
    assert main(["bench", "model", "configs/demo.yaml", "--modes", "some", *SMALL]) == 1
    assert "no mode some" in capsys.readouterr().err
    assert main(["bench", "model", "configs/demo.yaml", "--against", "whole-graph", "train.stage=stage0", *SMALL]) == 1
    assert "compares stage 1" in capsys.readouterr().err
    assert main(["bench", "model", "configs/demo.yaml", "--against", "diffusers", *SMALL]) == 1
    assert "stage0" in capsys.readouterr().err
    assert main(["bench", "model", "configs/demo.yaml", *SMALL, "--repeats", "0"]) == 1
    assert "--repeats must be at least 1" in capsys.readouterr().err
