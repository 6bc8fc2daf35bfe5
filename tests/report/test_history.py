import json

import pytest
from tiny_training import write_config as write_tiny

from fw_train.config import load_config
from fw_train.inference import write_config
from fw_train.report.history import read_history


def make_run(folder, lines, stage="stage1"):
    folder.mkdir(parents=True)
    config = load_config(write_tiny(folder / "given.yaml", "data", folder, train={"stage": stage}))
    write_config(folder, config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"state": "stopped", "step": 4, "reason": "asked"}))
    return folder


def test_figures_by_step_of_the_last_attempt(tmp_path):
    lines = [
        {"kind": "run", "step": 0, "code_version": "1 abc"},
        {"kind": "step", "step": 2, "time": 1.0, "loss/total": 4.0, "last": {"loss/total": 4.0}},
        {"kind": "step", "step": 4, "time": 2.0, "loss/total": 3.0},
        {"kind": "validation", "step": 4, "validation/depth_loss": 0.5},
        {"kind": "step", "step": 4, "time": 3.0, "loss/total": "nan"},
        {"kind": "step", "step": 2, "time": 4.0, "loss/total": 3.5},
    ]
    folder = make_run(tmp_path / "run", lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # killed while it wrote
    history = read_history(folder)
    assert history.trained["loss/total"] == ([2], [3.5])
    assert history.validated["validation/depth_loss"] == ([4], [0.5])
    assert "time" not in history.trained
    assert history.code == "1 abc"
    assert history.status.state == "stopped"
    assert history.stage == "stage1"


def test_the_last_weights_are_those_of_the_largest_step(tmp_path):
    folder = make_run(tmp_path / "run", [])
    assert read_history(folder).weights is None
    for step in (90, 100, 20):
        (folder / f"step-{step}.safetensors").touch()
    assert read_history(folder).weights.name == "step-100.safetensors"


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run"):
        read_history(tmp_path)
