"""`fw bench train`: real ranks and engines, a tiny network; nothing here judges a time."""

import json
import sys

import pytest
from tiny_training import make_data, write_config

from fw_train.cli import main
from fw_train.commands.bench_engine import covered
from fw_train.commands.bench_loop import Cost, figures, mean_step
from processes import run_command

BENCH = [sys.executable, "-m", "fw_train.cli", "bench", "train"]
TRAINED = 78_630  # parameters of the tiny network in stage 1


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Both engines on two ranks, on real data."""
    folder = tmp_path_factory.mktemp("engines")
    config = write_config(folder / "tiny.yaml", make_data(folder), folder / "runs" / "out")
    arguments = ["train.global_batch=2", "run.peak_tflops=0.001", "--engines", "deepspeed,fsdp2", "--rounds", "1"]
    arguments += ["--steps", "2", "--warmup", "0", "--json", folder / "figures.json"]
    outcomes = run_command([*BENCH, config, *map(str, arguments)], size=2)
    return folder, outcomes, json.loads((folder / "figures.json").read_text())


def test_every_engine_has_all_parts_of_a_step_and_they_fill_it(two_ranks):
    _, outcomes, report = two_ranks
    assert "both, of one rank's ideal" in outcomes[0].output
    assert "both, of one rank's ideal" not in outcomes[1].output, "rank 0 talks for all"
    assert report["ranks"] == 2
    for found in report["figures"].values():
        parts = found["parts_s"]
        assert list(parts) == ["data", "expand", "forward", "backward", "optimiser"]
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(found["step_s"], rel=0.2)
        assert found["reduce_s"] > 0, "two ranks reduce gradients"
        assert found["samples_per_s"] == pytest.approx(2 / found["step_s"])
        assert found["tokens_per_s"] == pytest.approx(found["samples_per_s"] * 2 * 2 * 3)
        assert found["mfu"] > 0


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_two_ranks_halve_the_state_and_a_checkpoint_is_no_larger_than_it_must_be(two_ranks, engine):
    found = two_ranks[2]["figures"][engine]
    assert 0.5 <= found["state_share"] <= 0.55
    assert found["optimiser_bytes"] + found["gradient_bytes"] == pytest.approx(
        found["state_share"] * TRAINED * 16, abs=16
    )
    assert found["checkpoint_ratio"] == pytest.approx(found["checkpoint_bytes"] / (TRAINED * (4 + 12)))
    assert found["checkpoint_ratio"] < 1.12, "names and hashes weigh much beside so few weights"


def test_nothing_is_left_of_the_checkpoints(two_ranks):
    assert list((two_ranks[0] / "runs").iterdir()) == []


def test_the_trainer_is_timed_against_a_bare_loop_on_one_batch_without_data(tmp_path):
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "no data", tmp_path / "runs" / "out")
    arguments = ["train.global_batch=2", "engine.kind=fsdp2", "data.validation=nowhere", "--synthetic-batch"]
    arguments += ["--against", "bare-loop", "--rounds", "2", "--steps", "3", "--json", tmp_path / "figures.json"]
    output = run_command([*BENCH, config, *map(str, arguments)], size=1)[0].output
    assert "step 7/7" in output, "the trainer itself ran, with its monitor"
    found = json.loads((tmp_path / "figures.json").read_text())["figures"]["fsdp2"]
    assert (found["turns"], found["steps"]) == (2, 4)
    assert found["bare"]["wall_s"] > 0
    assert found["trainer"]["cpu_s"] > 0
    assert 0 < found["own_s"] < found["trainer"]["engine_s"] < found["trainer"]["wall_s"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_first_step_of_a_turn_is_not_counted():
    marks = [Cost(0.0, 0.0, 0.0), Cost(9.0, 5.0, 8.0), Cost(10.0, 5.5, 9.0), Cost(13.0, 6.0, 11.0)]
    assert mean_step(marks) == Cost(2.0, 0.5, 1.5)


def test_ratios_are_of_the_same_turn_and_totals_keep_what_medians_leave_out():
    bare = [Cost(1.0, 1.0, 1.0), Cost(2.0, 1.0, 2.0), Cost(4.0, 1.0, 4.0)]
    trainer = [Cost(1.1, 1.0, 1.0), Cost(2.2, 1.0, 2.0), Cost(8.0, 4.0, 7.0)]
    found = figures(bare, trainer, counted=5)
    assert found.wall.median == pytest.approx(1.1)
    assert found.wall.total == pytest.approx(11.3 / 7)
    assert found.cpu.median == 1.0
    assert found.cpu.total == 2.0
    assert found.own_s == pytest.approx(0.2)
    assert (found.turns, found.steps) == (3, 15)


def test_intervals_that_overlap_count_once():
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--rounds", "0"], "at least 1 round"), (["--engines", "horovod"], "engine.kind"), (["--steps", "1"], "2 steps")],
)
def test_wrong_wishes_are_errors_before_anything_is_built(capsys, arguments, said):
    assert main(["bench", "train", "configs/demo.yaml", *arguments]) == 1
    assert said in capsys.readouterr().err
