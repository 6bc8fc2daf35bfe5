import json
import re

import pytest
import torch

from fw_train.cli import main
from fw_train.weights.stage import StageInfo, write_stage_weights


@pytest.fixture
def run_folder(tmp_path):
    for step, stage in ((100, "stage1"), (200, "stage1"), (300, "stage1"), (400, "stage2")):
        info = StageInfo(stage, step, "config", "base", torch.float32)
        write_stage_weights(tmp_path / f"step-{step}.safetensors", {"token_camera": torch.zeros(2)}, info)
    figures = {100: (0.09, 0.4, 0.04), 200: (0.11, 0.4, 0.05), 250: (0.01, 0.01, 0.01), 400: (0.01, 0.1, 0.01)}
    lines = []
    for step, (depth, point, camera) in figures.items():
        lines.append(
            {"kind": "validation", "step": step, "validation/depth_loss": depth, "validation/point_loss": point,
             "validation/camera_loss": camera, "validation/depth_loss_s0.5": 9.0}
        )  # fmt: skip
    lines.append({"kind": "step", "step": 100, "loss/depth_loss": 9.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "val')
    return tmp_path


def validated(run_folder, step, **losses):
    """One more validation."""
    line = {"kind": "validation", "step": step, **{f"validation/{name}_loss": loss for name, loss in losses.items()}}
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(line))


def test_a_ready_step_prints_its_weights(run_folder, capsys):
    assert main(["promote", str(run_folder), "--step", "100"]) == 0
    assert capsys.readouterr().out == f"{run_folder / 'step-100.safetensors'}\n"


def test_every_mark_that_is_missed_is_told_and_equal_is_not_below(run_folder, capsys):
    assert main(["promote", str(run_folder), "--step", "200"]) == 1
    told = capsys.readouterr().err
    assert "the depth loss is 0.11, and must be below 0.1" in told
    assert "the camera loss is 0.05, and must be below 0.05" in told
    assert "point" not in told
    assert main(["promote", str(run_folder), "--step", "200", "--depth", "0.2", "--camera", "0.06"]) == 0


def test_losses_that_are_not_finite_or_missing_are_no_pass(run_folder, capsys):
    lines = [
        {"kind": "validation", "step": 300, "validation/depth_loss": "nan", "validation/point_loss": 0.1},
    ]
    (run_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["promote", str(run_folder)]) == 1
    told = capsys.readouterr().err
    assert "step 300" in told
    assert "the depth loss is nan, and must be below 0.1" in told
    assert "the camera loss was not measured" in told


def test_the_marks_are_the_published_ones(run_folder, capsys):
    validated(run_folder, 300, depth=0.0999, point=0.4999, camera=0.0499)
    assert main(["promote", str(run_folder), "--step", "300"]) == 0
    validated(run_folder, 300, depth=0.1, point=0.5, camera=0.05)
    assert main(["promote", str(run_folder), "--step", "300"]) == 1
    marks = {"depth": "0.1", "point": "0.5", "camera": "0.05"}
    told = [f"  the {name} loss is {mark}, and must be below {mark}" for name, mark in marks.items()]
    assert capsys.readouterr().err.splitlines()[1:] == told


def test_a_step_whose_weights_are_gone_is_not_the_last_one_that_can_be_judged(run_folder, capsys):
    (run_folder / "step-400.safetensors").unlink()
    validated(run_folder, 300, depth=0.01, point=0.01, camera=0.01)
    assert main(["promote", str(run_folder)]) == 0
    assert capsys.readouterr().out == f"{run_folder / 'step-300.safetensors'}\n"


def test_a_run_without_a_step_that_was_validated_and_saved_is_an_error(run_folder, capsys):
    for weights in run_folder.glob("*.safetensors"):
        weights.unlink()
    assert main(["promote", str(run_folder)]) == 1
    assert "has no step that was both validated and saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "250"], "no .*step-250.safetensors; steps with weights: 100, 200, 300, 400"),
        (["--step", "300"], r"step 300 was not validated; validated were \[100, 200, 250, 400\]"),
        ([], "holds the weights of stage2"),
    ],
)
def test_what_cannot_be_judged_is_an_error(run_folder, capsys, arguments, message):
    assert main(["promote", str(run_folder), *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)
