import json
import textwrap
from pathlib import Path

import pytest
from tiny_training import write_config

from fw_train.cli import main


@pytest.fixture
def tiny(tmp_path):
    return str(write_config(tmp_path / "tiny.yaml", "data", tmp_path / "out"))


def test_the_table_and_the_json_say_the_same(capsys, tmp_path, tiny):
    assert (
        main(["plan", tiny, "--gpus", "2", "--device", "H20", "--mfu", "0.3", "--json", str(tmp_path / "plan.json")])
        == 0
    )
    text = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert "time at an MFU of 30.0% (given)" in text
    assert "2 GPUs x micro-batch 1 x 2 accumulated" in text
    assert plan["speed"]["accumulate"] == 2
    assert plan["memory"]["engine"]["weights"] > 0
    assert [row["gpus"] for row in plan["what_if"]] == [2, 2, 2]


def test_a_benchmark_gives_the_mfu(capsys, tmp_path, tiny):
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps({"figures": {"deepspeed": {"mfu": 0.25}}}))
    assert main(["plan", tiny, "--gpus", "1", "--bench", str(figures)]) == 0
    assert f"time at an MFU of 25.0% (measured, {figures})" in capsys.readouterr().out
    figures.write_text(json.dumps({"figures": {"deepspeed": {"mfu": None}}}))
    assert main(["plan", tiny, "--gpus", "1", "--bench", str(figures)]) == 1
    assert "run.peak_tflops=148" in capsys.readouterr().err
    figures.write_text("{}")
    assert main(["plan", tiny, "--gpus", "1", "--bench", str(figures)]) == 1
    assert "no figures of the engine deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "3"], "use one of [1, 2, 4] GPUs"),
        (["--gpus", "0"], "must be at least 1"),
        (["--gpus", "1", "--device", "abacus"], "no figures for the device `abacus`; there are h20,"),
        (["--gpus", "1", "--mfu", "40"], "an MFU of 40 is not between 0 and 1"),
        (["--gpus", "1", "--mfu", "0.4", "--bench", "x"], "leave one out"),
    ],
)
def test_wrong_input_is_one_clear_error(capsys, tiny, words, message):
    assert main(["plan", tiny, *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_does_not_fit_is_a_warning_and_an_exit_code(capsys):
    words = ["--gpus", "64", "--device", "l40s", "train.activation_checkpointing=none"]
    assert main(["plan", "configs/stage1.yaml", *words]) == 1
    text = capsys.readouterr().out
    assert "WARNING: this does not fit; what would: train.activation_checkpointing=selective" in text
    assert "! does not fit" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["configs/stage1.yaml --gpus 64 --device h20", "configs/stage2.yaml --gpus 112 --device h20"]
)
def test_the_guide_shows_what_the_command_prints(command, capsys, tmp_path, monkeypatch):
    guide = Path("docs/cluster.md").resolve()
    path, *words = command.split()
    config = Path(path).resolve()
    monkeypatch.chdir(tmp_path)  # where the data of the configuration are not
    assert main(["plan", str(config), *words]) == 0
    assert textwrap.indent(capsys.readouterr().out, "    ").rstrip() in guide.read_text(), (
        f"put its new output into {guide}"
    )
