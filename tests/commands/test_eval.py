"""`fw eval` on tiny networks and clips of noise: figures, table, document, pictures, ranks."""

import json
import sys

import pytest
import torch
from tiny_training import make_data, write_config

from fw_train.build import base_identity, load_model, trainable_shapes, world_params
from fw_train.cli import main
from fw_train.commands.eval import names_of
from fw_train.config import config_hash, load_config
from fw_train.evaluation.metrics import DIFFUSION, GEOMETRY
from fw_train.evaluation.validation import validate
from fw_train.inference import load_trained
from fw_train.inference import write_config as leave_config
from fw_train.run.data import BatchMaker, HeldOut
from fw_train.weights.stage import StageInfo, write_stage_weights
from processes import run_command

SIZE = [16, 32]
ALL_GEOMETRY, ALL_DIFFUSION = ({metric.name for metric in metrics} for metrics in (GEOMETRY, DIFFUSION))


def trained(folder, data, stage="stage1", step=3, **weights):
    """What a run leaves: its configuration beside weights that no fresh network has."""
    folder.mkdir(parents=True, exist_ok=True)
    validated = {"validation": str(data), "sizes_px": [SIZE]}
    path = write_config(folder / "given.yaml", data, folder, train={"stage": stage}, weights=weights, data=validated)
    config = load_config(path)
    model = load_model(config, "cpu")
    generator, own = torch.Generator().manual_seed(step), dict(model.named_parameters())
    tensors = {
        name: own[name] + 0.1 * torch.randn(own[name].shape, generator=generator)
        for name in trainable_shapes(model, stage)
    }
    info = StageInfo(stage, step, config_hash(config), base_identity(config), torch.float32)
    write_stage_weights(folder / f"step-{step}.safetensors", tensors, info)
    leave_config(folder, config)
    return folder / f"step-{step}.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), clips=3, height=SIZE[0], width=SIZE[1])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("runs")
    base = trained(folder / "zero", data, "stage0")
    return [base, *(trained(folder / "one", data, step=step, base=str(base)) for step in (3, 6))]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, data, checkpoints):
    output = tmp_path_factory.mktemp("evaluated")
    words = [*checkpoints, data, "--clips", 3, "--pictures", 2, "--cases", "--output", output]
    assert main(["eval", *map(str, words)]) == 0
    return output, json.loads((output / "eval.json").read_text())


def test_all_metrics_of_all_checkpoints_stand_in_one_document(evaluated, data, checkpoints):
    _, tree = evaluated
    assert (tree["data"], tree["clips"], tree["level"]) == (str(data), 3, 0.1)
    assert [(entry["name"], entry["stage"], entry["step"], entry["path"]) for entry in tree["checkpoints"]] == [
        ("zero/step-3", "stage0", 3, str(checkpoints[0])),
        ("one/step-3", "stage1", 3, str(checkpoints[1])),
        ("one/step-6", "stage1", 6, str(checkpoints[2])),
    ]
    stage0, first, last = (entry["metrics"] for entry in tree["checkpoints"])
    assert set(stage0) == ALL_DIFFUSION  # its geometry branch is fresh and tells nothing
    cases = {name + case for name in ALL_GEOMETRY for case in ("", "_s0.5", "_s0.9", "_with_camera")}
    assert set(first) == set(last) == cases | ALL_DIFFUSION
    assert first["depth/absrel"] != last["depth/absrel"]
    assert first["depth/absrel"] != first["depth/absrel_s0.5"]
    assert set(tree["constant"]) == ALL_GEOMETRY
    assert {name: first[name] for name in ALL_DIFFUSION} == pytest.approx(
        stage0
    )  # stage 1 leaves the video branch alone


def test_the_figures_are_those_of_the_runs_own_validation(evaluated, checkpoints):
    model, config, _ = load_trained(checkpoints[1], overrides=["run.validation_samples=3"])
    wan = world_params(config).wan
    make_batch = BatchMaker(config, wan, torch.device("cpu"))
    clips = ((make_batch(coded), counts) for coded, counts in HeldOut(config, wan, 0, 1).batches())
    own = validate(
        model, clips, seed=0, dtype=torch.float32, geometry=True, diffusion=True, all_sum=lambda value: value
    )
    metrics = evaluated[1]["checkpoints"][1]["metrics"]
    for case in ("", "_s0.5", "_s0.9", "_with_camera"):
        for term in ("depth", "point", "camera"):
            assert metrics[f"loss/{term}{case}"] == pytest.approx(own.values[f"validation/{term}_loss{case}"]), case
    assert metrics["diffusion/mean"] == pytest.approx(own.values["validation/diffusion"])
    bins = [metrics[metric.name] for metric in DIFFUSION[1:]]
    assert bins == pytest.approx(own.diffusion_bins)


def test_pictures_show_the_first_clips_of_the_networks_that_have_geometry(evaluated):
    output, tree = evaluated
    assert tree["pictures"] == [
        "pictures/depth_00.png", "pictures/cameras_00.png", "pictures/depth_01.png", "pictures/cameras_01.png",
    ]  # fmt: skip
    assert sorted(f"pictures/{path.name}" for path in (output / "pictures").iterdir()) == sorted(tree["pictures"])
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in tree["pictures"])


def test_two_ranks_find_what_one_finds(tmp_path, data, checkpoints, evaluated):
    """Three clips over two ranks: one of them repeats a clip that does not count."""
    words = [checkpoints[2], data, "--clips", 3, "--pictures", 1, "--output", tmp_path]
    command = [sys.executable, "-m", "fw_train.cli", "eval", *map(str, words)]
    outcomes = run_command(command, size=2)
    together, alone = json.loads((tmp_path / "eval.json").read_text()), evaluated[1]
    metrics = alone["checkpoints"][2]["metrics"]
    judged = {name: metrics[name] for name in ALL_GEOMETRY | ALL_DIFFUSION}
    assert together["checkpoints"][0]["metrics"] == pytest.approx(judged, rel=1e-9)
    assert together["constant"] == pytest.approx(alone["constant"], rel=1e-9)
    assert together["clips"] == 3
    assert "depth/absrel" in outcomes[0].output
    assert "depth/absrel" not in outcomes[1].output


def test_the_same_command_again_writes_the_same(tmp_path, data, checkpoints, capsys):
    words = [checkpoints[1], data, "--clips", 1, "--pictures", 1, "--no-diffusion", "--output", tmp_path]
    files = []
    for _ in range(2):
        assert main(["eval", *map(str, words)]) == 0
        files.append({path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
    assert len(files[0]) == 3
    assert files[0] == files[1]
    out = capsys.readouterr().out
    assert "one/step-3  constant" in out
    assert "diffusion" not in out


def test_json_and_no_training_data(tmp_path, data, checkpoints, capsys):
    output = ["--output", tmp_path / "new" / "place", "--pictures", 0]
    words = [checkpoints[1], data, "--clips", 1, "--json", "--no-diffusion", *output]
    words.append(f"data.sources=[{{path: {tmp_path}/nowhere}}]")
    assert main(["eval", *map(str, words)]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["constant"] == {}
    assert set(tree["checkpoints"][0]["metrics"]) == ALL_GEOMETRY
    assert tree["pictures"] == []
    assert json.loads((tmp_path / "new" / "place" / "eval.json").read_text()) == tree


def test_one_clip_is_its_own_best_constant(tmp_path, capsys):
    one = make_data(tmp_path, clips=1, height=SIZE[0], width=SIZE[1])
    checkpoint = trained(tmp_path / "run", one)
    assert main(["eval", str(checkpoint), str(one), "--no-diffusion", "--json"]) == 0
    constant = json.loads(capsys.readouterr().out)["constant"]
    assert constant["depth/absrel"] == pytest.approx(0, abs=1e-6)
    assert constant["points/pixel"] == pytest.approx(0, abs=1e-6)
    assert constant["cameras/auc30"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{data}"], "give at least one step-N.safetensors"),
        (["{one}", "{one}"], "is no folder"),
        (["{one}", "{one}", "{data}"], "a checkpoint is named twice"),
        (["{one}", "{data}", "--level", "1.5"], "--level 1.5 must lie between 0 and 1"),
        (["{one}", "{data}", "--clips", "0"], "--clips 0 must be at least 1"),
        (["{one}", "{data}", "--output", "{one}"], "File exists"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_loaded(words, message, data, checkpoints, capsys):
    assert main(["eval", *(word.format(data=data, one=checkpoints[1]) for word in words)]) == 1
    assert message in capsys.readouterr().err


def test_checkpoints_of_other_clips_do_not_compare(tmp_path, data, checkpoints, capsys):
    other = trained(tmp_path / "other", data)
    text = (tmp_path / "other" / "config.yaml").read_text()
    (tmp_path / "other" / "config.yaml").write_text(text.replace("  frames: 5", "  frames: 1"))
    assert main(["eval", str(checkpoints[0]), str(other), str(data), "--clips", "1"]) == 1
    error = capsys.readouterr().err
    assert "is configured for 1 clips of 1 frames of 16x32, the first checkpoint for 1 clips of 5 frames" in error


def test_names_are_as_short_as_they_can_be(tmp_path):
    paths = [tmp_path / name for name in ("a/run/step-1.safetensors", "a/run/step-2.safetensors")]
    assert names_of(paths) == ["run/step-1", "run/step-2"]
    assert names_of([paths[0], tmp_path / "b/run/step-1.safetensors"]) == ["a/run/step-1", "b/run/step-1"]
