import io
import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fw_train.monitor import EVENTS, METRICS, Monitor, RunFacts, StepRecord, silent_monitor


def facts(**changes):
    known = {
        "total_steps": 8,
        "global_batch": 4,
        "world_size": 2,
        "flops_per_sample": 3e12,
        "tokens_per_sample": 100,
        "peak_flops_per_gpu": 1e13,
        "config_text": "train:\n  steps: 8\n",
        "code_version": "v0.1.0-3-gabc",
        "hparams": {"train.learning_rate": 1e-3, "train.stage": "stage1"},
    }
    return RunFacts(**{**known, **changes})


def record(step, **changes):
    known = {
        "losses": {"loss/total": float(step), "loss/depth_loss": step / 2},
        "learning_rates": {"weights": 1e-3 / (step + 1), "gates": 1e-2},
        "grad_norm": 1.0 + step,
        "group_norms": {"bridge": 0.5 * step},
        "gates": {},
        "applied": True,
        "reason": "",
        "seconds": 2.0,
        "data_wait_s": 0.1,
        "save_stall_s": 0.0,
        "peak_memory_bytes": 1 << 30,
        "samples": 4,
        "substituted": 0,
        "parts_s": {"forward": 0.5},
    }
    return StepRecord(step, **{**known, **changes})


def monitor(folder, first_step=0, every=4, stream=None, **changes):
    return Monitor(
        folder, facts(**changes), log_every_steps=every, stream=stream or io.StringIO(), first_step=first_step
    )


def lines(folder, kind=None):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    found = [json.loads(line, parse_constant=refuse) for line in (folder / METRICS).read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def events(folder):
    return EventAccumulator(str(folder / EVENTS), size_guidance={"tensors": 0, "scalars": 0, "images": 0}).Reload()


def points(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_an_interval_is_written_as_means_rates_and_shares(tmp_path):
    log = monitor(tmp_path)
    for step in range(4):
        log.step(record(step, seconds=1.0 + step, data_wait_s=0.3, gates={"gate": 0.25} if step == 1 else {}))
    log.close()
    first, interval = lines(tmp_path, "step")
    assert (first["step"], first["steps"], interval["step"], interval["steps"]) == (1, 1, 4, 3)
    want = {
        "loss/total": (1 + 2 + 3) / 3,
        "loss/depth_loss": 1.0,
        "optimiser_learning_rate/weights": 1e-3 / 4,
        "optimiser_learning_rate/gates": 1e-2,
        "optimiser/gradient_norm": 3.0,
        "optimiser/gradient_norm_highest": 4.0,
        "optimiser_gradient_norm/bridge": 1.0,
        "optimiser_gates/gate": 0.25,
        "throughput/seconds_per_step": 3.0,
        "throughput/samples_per_s": 12 / 9,
        "throughput/tokens_per_s": 1200 / 9,
        "throughput/mfu_percent": 100 * 3e12 * (12 / 9) / 2e13,
        "throughput/data_wait_percent": 10.0,
        "throughput/save_stall_s": 0.0,
        "throughput/peak_memory_gib": 1.0,
        "step_parts/forward_s": 0.5,
        "samples/skipped_steps": 0,
        "samples/skipped_samples": 0,
        "samples/substituted_samples": 0,
    }
    assert {name: interval[name] for name in want} == pytest.approx(want)
    assert set(interval) == {*want, "kind", "step", "time", "steps", "last"}
    assert interval["last"] == {"loss/total": 3.0, "loss/depth_loss": 1.5, "optimiser/gradient_norm": 4.0}
    for tag, value in want.items():
        assert points(tmp_path, tag)[-1] == (4, pytest.approx(value)), tag
    assert set(events(tmp_path).Tags()["scalars"]) == set(want)


def test_after_a_resume_no_step_is_there_twice(tmp_path):
    log = monitor(tmp_path, every=1)
    for step in range(6):
        log.step(record(step))
    log.validation(4, {"validation/depth_loss": 0.4}, None)
    log.validation(6, {"validation/depth_loss": 0.6}, None)
    log.close()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "step", "st')
    log = monitor(tmp_path, first_step=4, every=1)
    for step in range(4, 8):
        log.step(record(step, losses={"loss/total": 100.0 + step}))
    log.close()
    want = [(1, 0), (2, 1), (3, 2), (4, 3), (5, 104), (6, 105), (7, 106), (8, 107)]
    assert [(line["step"], line["loss/total"]) for line in lines(tmp_path, "step")] == want
    assert points(tmp_path, "loss/total") == want
    assert [line["step"] for line in lines(tmp_path, "validation")] == [4]
    assert points(tmp_path, "validation/depth_loss") == [(4, pytest.approx(0.4))]


def test_a_skipped_step_is_written_at_once_and_leaves_the_means_alone(tmp_path):
    log = monitor(tmp_path)
    log.step(record(0))
    bad = {"loss/total": math.nan, "loss/depth_loss": math.inf}
    log.step(record(1, applied=False, reason="loss/total is nan", losses=bad, grad_norm=-math.inf))
    log.step(record(2, substituted=3))
    log.close()
    (skipped,) = lines(tmp_path, "skipped")
    assert (skipped["step"], skipped["reason"]) == (2, "loss/total is nan")
    assert (skipped["loss/total"], skipped["loss/depth_loss"], skipped["optimiser/gradient_norm"]) == (
        "nan",
        "inf",
        "-inf",
    )
    last = lines(tmp_path, "step")[-1]
    assert (last["step"], last["steps"], last["loss/total"], last["optimiser/gradient_norm"]) == (3, 2, 2.0, 3.0)
    assert (last["samples/skipped_steps"], last["samples/skipped_samples"], last["samples/substituted_samples"]) == (
        1,
        4,
        3,
    )


def test_the_silent_monitor_takes_everything_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = silent_monitor()
    log.step(record(0))
    log.validation(1, {"validation/depth_loss": 0.1}, {"validation/diffusion_by_timestep": [0.1] * 10})
    log.event(1, "note")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
