"""Whole runs of the trainer: real ranks, engines, files; one server starts them all."""

import argparse
import json
import shutil
import signal

import pytest
from forked_training import Fault, TrainingServer, read_trace
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import make_data, write_config

from data_tools import encode
from fw_train.config import load_config
from fw_train.inference import CONFIG_NAME
from fw_train.monitoring.metrics_file import read_lines
from fw_train.monitoring.monitor import EVENTS, METRICS
from fw_train.run.folder import read_status

ENGINES = ("deepspeed", "fsdp2")
STEPS = 8


@pytest.fixture(scope="module")
def server():
    with TrainingServer() as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory, data):
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", data, "set run.output")


@pytest.fixture(scope="module")
def whole(server, config, data, tmp_path_factory):
    """Uninterrupted runs on two ranks, by engine."""
    folders = {}
    for engine in ENGINES:
        folder = folders[engine] = tmp_path_factory.mktemp(engine)
        arguments = [config, f"run.output={folder / 'out'}", f"engine.kind={engine}", f"data.validation={data}"]
        server.run(arguments, size=2, folder=folder)
    return folders


def values(line):
    return {name: float.fromhex(text) for name, text in line["losses"].items()}


def figures(out, kind):
    return [line for line in read_lines(out / METRICS) if line["kind"] == kind]


def drawn(out, tag):
    return EventAccumulator(str(out / EVENTS), size_guidance={"images": 0}).Reload().Images(tag)


def all_keys(folder, ranks, name="run"):
    """Per step, the samples of all ranks with their places in the global order."""
    steps = {}
    for rank in range(ranks):
        for line in read_trace(folder, rank, name):
            steps.setdefault(line["step"], set()).update(zip(line["positions"], line["keys"], strict=True))
    return steps


def test_a_run_leaves_weights_checkpoints_figures_and_its_status(whole):
    out = whole["deepspeed"] / "out"
    assert read_status(out) == ("finished", STEPS, "")
    assert sorted(path.name for path in out.glob("step-*.safetensors")) == [f"step-{n}.safetensors" for n in (3, 6, 8)]
    with safe_open(out / "step-8.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata()["stage"] == "stage1"
        assert json.loads(file.metadata()["encodings"]).keys() == {"latent", "text"}
    assert "geo_blocks.0.self_attn.q.weight" in names
    assert not any(name.startswith("video.") for name in names)
    steps = figures(out, "step")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in figures(out, "validation")] == [0, STEPS]
    assert [line["step"] for line in steps if "loss/diffusion" in line] == [1, 4, 7]
    assert [line["step"] for line in steps if line["throughput/save_stall_s"]] == [3, 6, STEPS]
    assert all(line["optimiser_gradient_norm/geo_blocks"] > 0 for line in steps)
    assert any((out / "tensorboard").iterdir())


def test_both_engines_train_alike(whole):
    traces = [read_trace(whole[engine]) for engine in ENGINES]
    for ours, theirs in zip(*traces, strict=True):
        assert ours["keys"] == theirs["keys"]
        assert values(ours) == pytest.approx(values(theirs), rel=1e-5)
        assert ours["rate"] == theirs["rate"]


def test_the_loss_falls_and_rates_follow_the_schedule(whole):
    trace = read_trace(whole["deepspeed"])
    assert values(trace[-1])["loss/total"] < 0.97 * values(trace[0])["loss/total"]
    assert [line["rate"]["base"] for line in trace[:4]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert [line["optimiser_steps"] for line in trace] == list(range(1, STEPS + 1))


def check_twin(whole, folder, ranks=2):
    """Every step that was ever done, repeated ones too, is that of the uninterrupted run."""
    for rank in range(ranks):
        expected = {line["step"]: line for line in read_trace(whole, rank)}
        done = read_trace(folder, rank)
        assert done[-1]["step"] == STEPS - 1
        for line in done:
            assert line == expected[line["step"]]


def test_validation_and_pictures_come_when_asked_and_figures_do_not_depend_on_the_ranks(
    server, config, data, whole, tmp_path
):
    out = tmp_path / "out"
    arguments = [
        config, f"run.output={out}", f"data.validation={data}", "run.validate_every_steps=2", "run.log_pictures_every=2",
        "train.gate_lr_scale=10",
    ]  # fmt: skip
    server.run([*arguments, "train.steps=3"], size=1, folder=tmp_path)
    server.run([*arguments, "train.steps=5"], size=1, folder=tmp_path)
    lines = figures(out, "validation")
    assert [line["step"] for line in lines] == [0, 2, 3, 4, 5]
    assert ["validation/diffusion" in line for line in lines] == [True, False, False, False, False]
    (pictures,) = {tuple(image.step for image in drawn(out, tag)) for tag in ("pictures/depth", "pictures/camera_path")}
    assert pictures == (2, 3, 4, 5)
    of_two = figures(whole["deepspeed"] / "out", "validation")[0]
    named = [name for name in of_two if name.startswith("validation/")]
    assert {name: lines[0][name] for name in named} == {name: pytest.approx(of_two[name], rel=1e-5) for name in named}
    assert all(line["rate"]["gates"] == 10 * line["rate"]["base"] for line in read_trace(tmp_path))
    assert [line["text"].split(" with")[0] for line in figures(out, "event")] == ["resumed on 1 ranks"]


@pytest.mark.parametrize("engine", ENGINES)
def test_four_kills_and_resumes_change_nothing(server, config, whole, tmp_path, engine):
    arguments = [config, f"run.output={tmp_path / 'out'}", f"engine.kind={engine}", "run.save_every_steps=2"]
    # events of a step: two forward passes, the optimiser's, the end, and every second step a save before the end
    for kill in (
        Fault("kill", 1, event=11),
        Fault("kill", 0, event=8),
        Fault("kill", 1, event=6),
        Fault("kill", 0, event=9),
    ):
        outcomes = server.run(arguments, size=2, folder=tmp_path, faults=[kill], check=False)
        assert outcomes[kill.rank].returncode == -signal.SIGKILL
        assert outcomes[1 - kill.rank].returncode not in (0, None)
    server.run(arguments, size=2, folder=tmp_path)
    check_twin(whole[engine], tmp_path)
    assert read_status(tmp_path / "out").state == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_forty_kills_change_nothing(server, config, whole, tmp_path, engine):
    import random

    draw = random.Random(0)
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        arguments = [config, f"run.output={folder / 'out'}", f"engine.kind={engine}", "run.save_every_steps=1"]
        for _ in range(2):
            kill = Fault("kill", draw.randrange(2), event=draw.randrange(1, 18))
            server.run(arguments, size=2, folder=folder, faults=[kill], check=False)
        server.run(arguments, size=2, folder=folder)
        check_twin(whole[engine], folder)


def test_the_global_batch_is_the_same_however_it_is_split(server, config, tmp_path):
    runs = {}
    for ranks, accumulate in ((1, 8), (2, 4), (4, 2)):
        folder = tmp_path / f"{ranks}x{accumulate}"
        folder.mkdir()
        arguments = [
            config,
            f"run.output={folder / 'out'}",
            "train.global_batch=8",
            "train.steps=10",
            "data.validation=",
        ]
        server.run(arguments, size=ranks, folder=folder)
        runs[ranks] = folder
    trace = {ranks: read_trace(folder) for ranks, folder in runs.items()}
    for ranks in (2, 4):
        assert all_keys(runs[ranks], ranks) == all_keys(runs[1], 1)
        for one, many in zip(trace[1], trace[ranks], strict=True):
            assert values(many) == pytest.approx(values(one), rel=1e-5)


def test_a_run_goes_on_with_other_ranks_and_the_other_engine(server, config, whole, tmp_path):
    arguments = [config, f"run.output={tmp_path / 'out'}", "guard.agree_every_steps=1"]
    for number, (ranks, engine, steps) in enumerate(((2, "deepspeed", 3), (4, "fsdp2", 6), (2, "deepspeed", STEPS))):
        server.run(
            [*arguments, f"engine.kind={engine}", f"train.steps={steps}"],
            size=ranks,
            folder=tmp_path,
            name=f"part{number}",
        )
    expected = read_trace(whole["deepspeed"])
    done = [line for number in range(3) for line in read_trace(tmp_path, 0, f"part{number}")]
    assert [line["step"] for line in done] == list(range(STEPS))
    for ours, theirs in zip(done, expected, strict=True):
        assert values(ours) == pytest.approx(values(theirs), rel=1e-5)
    samples = {}
    for number, ranks in enumerate((2, 4, 2)):
        samples |= all_keys(tmp_path, ranks, f"part{number}")
    assert samples == all_keys(whole["deepspeed"], 2)


def test_what_changes_the_numbers_is_refused_at_resume_unless_it_is_named(server, config, tmp_path):
    arguments = [config, f"run.output={tmp_path / 'out'}", "train.warmup_steps=0"]
    server.run([*arguments, "train.steps=2"], size=1, folder=tmp_path)
    changed = [*arguments, "train.steps=3", "train.weight_decay=0.5"]
    (refused,) = server.run(changed, size=1, folder=tmp_path, check=False, name="refused")
    assert refused.returncode == 1
    assert "train.weight_decay: 0.01 in the checkpoint, 0.5 now" in refused.output
    assert "--allow-change train.weight_decay" in refused.output
    server.run([*changed, "--allow-change", "train.weight_decay"], size=1, folder=tmp_path)
    assert read_status(tmp_path / "out") == ("finished", 3, "")


def test_the_global_batch_may_change_at_resume_if_that_is_named(server, config, tmp_path):
    arguments = [config, f"run.output={tmp_path / 'out'}"]
    server.run([*arguments, "train.steps=3"], size=1, folder=tmp_path)
    changed = [*arguments, "train.steps=5", "train.global_batch=8", "--allow-change", "train.global_batch"]
    server.run(changed, size=1, folder=tmp_path)
    places = [line["positions"] for line in read_trace(tmp_path)]
    assert [len(step) for step in places] == [4, 4, 4, 8, 8]
    assert [place for step in places for place in step] == list(range(28))


def test_other_data_are_refused_at_resume(server, config, data, tmp_path):
    other = make_data(tmp_path, clips=7)
    arguments = [config, f"run.output={tmp_path / 'out'}", "train.warmup_steps=0"]
    server.run([*arguments, "train.steps=1"], size=1, folder=tmp_path)
    elsewhere = [*arguments, f"data.sources=[{{path: {other}}}]"]
    (refused,) = server.run(elsewhere, size=1, folder=tmp_path, check=False, name="refused")
    assert refused.returncode == 1
    assert "the data are not those that the run trained on" in refused.output


@pytest.fixture
def encoded_again(data, tmp_path):
    """The data before, and a function that encodes their texts again in place."""
    copy = shutil.copytree(data, tmp_path / "packed")
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    words = [str(copy), "--text", "hash:8", "--workers", "1", "--replace"]
    return copy, lambda: encode.run(parser.parse_args(words))


def test_texts_that_were_encoded_again_in_place_are_refused_at_resume(server, config, encoded_again, tmp_path):
    copy, again = encoded_again
    arguments = [config, f"run.output={tmp_path / 'out'}", f"data.sources=[{{path: {copy}}}]", "train.warmup_steps=0"]
    arguments += ["data.text_tokens=64", "train.steps=2"]
    server.run([*arguments, "train.steps=1"], size=1, folder=tmp_path)
    again()
    (refused,) = server.run(arguments, size=1, folder=tmp_path, check=False, name="refused")
    assert refused.returncode == 1
    assert "the data are not those that the run trained on (sources: packed: sidecars: text was" in refused.output
    assert "encoder: 'noise' there, 'hash:8' here" in refused.output


def test_weights_are_not_handed_over_to_data_of_another_encoder(server, config, whole, encoded_again, tmp_path):
    copy, again = encoded_again
    again()
    one = whole["deepspeed"] / "out" / "step-8.safetensors"
    changes = ["train.stage=stage2", f"weights.init_from={one}", f"data.sources=[{{path: {copy}}}]"]
    changes += ["data.text_tokens=64", f"run.output={tmp_path / 'out'}"]
    (refused,) = server.run([config, *changes], size=1, folder=tmp_path, check=False)
    assert refused.returncode == 1
    assert (
        f"weights.init_from={one} was trained on data encoded otherwise (`text` has the fingerprint" in refused.output
    )
    assert "building the network" not in refused.output


def test_held_out_clips_of_another_encoder_are_refused(server, config, encoded_again, tmp_path):
    copy, again = encoded_again
    again()
    changes = [f"data.validation={copy}", "data.text_tokens=64", f"run.output={tmp_path / 'out'}"]
    (refused,) = server.run([config, *changes], size=1, folder=tmp_path, check=False)
    assert refused.returncode == 1
    assert f"data.validation={copy} was not encoded like data.sources (`text` has the fingerprint" in refused.output


@pytest.mark.parametrize(("event", "rank"), [(1, 0), (9, 1)])
def test_a_signal_on_one_rank_stops_all_after_the_step_saved(server, config, whole, tmp_path, event, rank):
    arguments = [config, f"run.output={tmp_path / 'out'}"]
    server.run(arguments, size=2, folder=tmp_path, faults=[Fault("signal", rank, event=event)])
    status = read_status(tmp_path / "out")
    assert (status.state, status.reason) == ("stopped", f"SIGTERM on rank {rank}")
    assert 0 < status.step < STEPS
    assert (tmp_path / "out" / f"step-{status.step}.safetensors").exists()
    server.run(arguments, size=2, folder=tmp_path)
    check_twin(whole["deepspeed"], tmp_path)


@pytest.mark.parametrize("phase", ["building the network", "validating"])
def test_a_signal_before_the_first_step_stops_too(server, config, data, tmp_path, phase):
    run = server.start(
        [config, f"run.output={tmp_path / 'out'}", f"data.validation={data}"],
        size=2,
        folder=tmp_path,
        faults=[Fault(f"signal in {phase}", 1)],
    )
    assert [outcome.returncode for outcome in run.wait(60)] == [0, 0]
    assert read_status(tmp_path / "out") == ("stopped", 0, "SIGTERM on rank 1, before the first step")


def test_a_folder_that_is_in_use_is_refused(server, config, tmp_path):
    arguments = [config, f"run.output={tmp_path / 'out'}", "guard.hang_s=120"]
    running = server.start(arguments, size=1, folder=tmp_path, faults=[Fault("hang", 0, step=1)], name="first")
    running.await_text(0, "step 1/8")
    with TrainingServer() as other:
        (second,) = other.run(arguments, size=1, folder=tmp_path, check=False, name="second")
    running.kill()
    running.wait(10)
    assert second.returncode == 1
    assert "is in use by" in second.output
    assert read_status(tmp_path / "out").state == "running"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.sources=[]", "data.sources is empty; name what `fw data pack` wrote"),
        ("train.global_batch=3", "global_batch 3 is not divisible by world 2 x micro_batch 1"),
        ("model.variant=i2v", "fw data encode"),
        ("data.sources=[{path: /nowhere}]", "/nowhere/manifest.jsonl is missing"),
        ("weights.base=/nowhere", "/nowhere"),
        ("data.frames=9", "frames"),
    ],
)
def test_what_cannot_be_trained_ends_with_one_clear_error(server, config, tmp_path, change, message):
    outcomes = server.run([config, f"run.output={tmp_path / 'out'}", change], size=2, folder=tmp_path, check=False)
    assert all(outcome.returncode == 1 for outcome in outcomes)
    assert any(message in outcome.output for outcome in outcomes)
    assert read_status(tmp_path / "out").state == "failed"


@pytest.mark.parametrize("stage", ["stage0", "stage2"])
def test_other_stages_train_too_and_hand_over(server, config, data, whole, tmp_path, stage):
    changes = ["train.steps=2", "train.warmup_steps=0", f"run.output={tmp_path / 'out'}", f"train.stage={stage}"]
    if stage == "stage2":
        changes.append(f"weights.init_from={whole['deepspeed'] / 'out' / 'step-8.safetensors'}")
    else:
        changes.append(f"data.validation={data}")
    server.run([config, *changes], size=2, folder=tmp_path)
    for line in figures(tmp_path / "out", "step"):
        assert any(name.startswith("optimiser_gates/") for name in line)
    if stage == "stage0":
        judged = [{n for n in line if n.startswith("validation/")} for line in figures(tmp_path / "out", "validation")]
        assert judged == [{"validation/diffusion", "validation/diffusion_by_timestep"}] * 2
    with safe_open(tmp_path / "out" / "step-2.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("blocks.0.self_attn.q.weight" in names) == (stage == "stage0")
    assert ("irg_cross_attns.0.gamma_m1" in names) == (stage == "stage2")


def test_the_configuration_is_kept_with_the_run(whole):
    manifest = json.loads((whole["deepspeed"] / "out" / "checkpoints" / "step-8" / "manifest.json").read_text())
    assert '"learning_rate": 0.001' in json.dumps(manifest)
    kept = load_config(whole["deepspeed"] / "out" / CONFIG_NAME)
    assert kept.run.output == str(whole["deepspeed"] / "out")
    assert kept.train.learning_rate == 0.001
