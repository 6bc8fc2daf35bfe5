import io
import json
import math
import re
import resource
import threading
from contextlib import contextmanager

import av
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fw_train.monitoring import event_files
from fw_train.monitoring.monitor import EVENTS, JUDGED_BY, METRICS, Monitor, RunFacts, StepRecord, silent_monitor
from fw_train.pictures.camera_path import CameraPath
from fw_train.pictures.scene import Scene, bars_picture, camera_sheet, depth_sheet


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
        "hparams": {"train.learning_rate": 1e-3, "train.stage": "stage1", "engine.cpu_offload": False},
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


def texts(folder, tag):
    found = events(folder).Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def decoded(png):
    with av.open(io.BytesIO(png)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def wait(log):
    """Returns when everything that was handed to the monitor has been tried."""
    done = threading.Event()
    log._later(done.set)
    assert done.wait(60)


@contextmanager
def full_disk(after):
    """No file of this process may grow beyond `after` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def scene():
    depth, path = np.linspace(1, 2, 96).reshape(8, 12), CameraPath(np.eye(3), np.eye(3))
    points = np.linspace(-1, 1, 30).reshape(10, 3) ** 2
    return Scene(
        frame=np.zeros((8, 12, 3), np.uint8),
        depth_true=depth,
        depth_predicted=depth,
        valid=depth < 1.9,
        points_true=points,
        points_predicted=points,
        point_colours=np.full((10, 3), 7, np.uint8),
        cameras_true=path,
        cameras_predicted=path,
    )


def test_an_interval_is_written_as_means_rates_and_shares(tmp_path):
    log = monitor(tmp_path)
    for step, (norm, stall_s, gib) in enumerate(((9, 9, 9), (2, 0.5, 1), (4, 0.25, 3), (3, 0, 2))):
        log.step(
            record(
                step, seconds=1.0 + step, data_wait_s=0.3, gates={"gate": 0.25} if step == 1 else {},
                grad_norm=norm, save_stall_s=stall_s, peak_memory_bytes=gib << 30,
            )
        )  # fmt: skip
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
        "throughput/save_stall_s": 0.75,
        "throughput/peak_memory_gib": 3.0,
        "step_parts/forward_s": 0.5,
        "samples/skipped_steps": 0,
        "samples/skipped_samples": 0,
        "samples/substituted_samples": 0,
    }
    assert {name: interval[name] for name in want} == pytest.approx(want)
    assert set(interval) == {*want, "kind", "step", "time", "steps", "last"}
    assert interval["last"] == {"loss/total": 3.0, "loss/depth_loss": 1.5, "optimiser/gradient_norm": 3.0}
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
    unused = {"group_norms": {"bridge": math.nan}, "gates": {"gate": 0.25}}
    log.step(record(1, applied=False, reason="loss/total is nan", losses=bad, grad_norm=-math.inf, **unused))
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
    assert (last["optimiser_gradient_norm/bridge"], last["optimiser_gates/gate"]) == (1.0, 0.25)
    assert (last["samples/skipped_steps"], last["samples/skipped_samples"], last["samples/substituted_samples"]) == (
        1,
        4,
        3,
    )


def test_counts_go_on_where_a_resumed_run_left_them(tmp_path):
    log = monitor(tmp_path, every=2)
    for step in range(6):
        log.step(record(step, substituted=step, applied=step != 1, reason="spike" if step == 1 else ""))
    log.close()
    log = monitor(tmp_path, first_step=4, every=2)
    log.step(record(4, substituted=7))
    log.close()
    last = lines(tmp_path, "step")[-1]
    assert (last["step"], last["samples/skipped_steps"], last["samples/substituted_samples"]) == (
        5,
        1,
        0 + 1 + 2 + 3 + 7,
    )


def test_an_interval_without_an_applied_step_has_rates_and_no_losses(tmp_path):
    stream = io.StringIO()
    log = monitor(tmp_path, stream=stream)
    log.step(record(0, applied=False, reason="spike"))
    log.close()
    (line,) = lines(tmp_path, "step")
    assert "loss/total" not in line
    assert "optimiser/gradient_norm" not in line
    assert line["throughput/samples_per_s"] == 2.0
    assert "loss      -" in stream.getvalue()


def test_a_peak_that_is_not_known_leaves_the_mfu_out(tmp_path):
    stream = io.StringIO()
    log = monitor(tmp_path, stream=stream, peak_flops_per_gpu=None)
    log.step(record(0))
    log.close()
    assert "throughput/mfu_percent" not in lines(tmp_path, "step")[0]
    assert "MFU" not in stream.getvalue()


def test_validation_is_written_by_name_and_by_timestep(tmp_path):
    losses = [0.1 * i for i in range(1, 11)]
    log = monitor(tmp_path)
    log.validation(0, {"validation/depth_loss": 0.25}, {"validation/diffusion_by_timestep": losses})
    log.close()
    (line,) = lines(tmp_path, "validation")
    assert (line["step"], line["validation/depth_loss"], line["validation/diffusion_by_timestep"]) == (0, 0.25, losses)
    assert points(tmp_path, "validation/depth_loss") == [(0, 0.25)]
    assert points(tmp_path, "validation_diffusion_by_timestep/t0000-0100") == [(0, pytest.approx(0.1))]
    assert points(tmp_path, "validation_diffusion_by_timestep/t0900-1000") == [(0, pytest.approx(1.0))]
    (image,) = events(tmp_path).Images("validation/diffusion_by_timestep")
    starts = ["0", *(f"{i}00" for i in range(1, 10))]
    drawn = bars_picture(losses, starts, "validation/diffusion_by_timestep after 0 steps")
    np.testing.assert_array_equal(decoded(image.encoded_image_string), drawn)


def test_pictures_and_points_are_written(tmp_path):
    log = monitor(tmp_path)
    log.pictures(5, scene())
    log.close()
    for tag, drawn in (("pictures/depth", depth_sheet(scene())), ("pictures/camera_path", camera_sheet(scene()))):
        (image,) = events(tmp_path).Images(tag)
        assert image.step == 5
        np.testing.assert_array_equal(decoded(image.encoded_image_string), drawn)
    vertices = events(tmp_path).Tensors("points/true_and_predicted_VERTEX")[0].tensor_proto
    assert [dim.size for dim in vertices.tensor_shape.dim] == [1, 20, 3]


def test_what_the_run_is_stands_in_text_and_hyperparameters(tmp_path):
    log = monitor(tmp_path)
    log.close()
    assert lines(tmp_path, "run")[0]["code_version"] == "v0.1.0-3-gabc"
    assert texts(tmp_path, "run/config") == [(0, "    train:\n      steps: 8")]
    assert "code_version: v0.1.0-3-gabc" in texts(tmp_path, "run/facts")[0][1]
    plugin = events(tmp_path).SummaryMetadata
    experiment, session = (
        HParamsPluginData.FromString(plugin(f"_hparams_/{part}").plugin_data.content)
        for part in ("experiment", "session_start_info")
    )
    assert session.session_start_info.hparams["train.learning_rate"].number_value == 1e-3
    assert session.session_start_info.hparams["train.stage"].string_value == "stage1"
    assert (
        session.session_start_info.hparams["engine.cpu_offload"].string_value == "false"
    )  # the page shows bools as 0.0000
    assert tuple(info.name.tag for info in experiment.experiment.metric_infos) == JUDGED_BY


def test_events_of_one_step_are_shown_together(tmp_path):
    stream = io.StringIO()
    log = monitor(tmp_path, stream=stream)
    log.event(3, "slow rank 5")
    log.event(3, "samples replaced")
    log.event(4, "resumed")
    log.close()
    assert [(line["step"], line["text"]) for line in lines(tmp_path, "event")] == [
        (3, "slow rank 5"),
        (3, "samples replaced"),
        (4, "resumed"),
    ]
    assert stream.getvalue().splitlines() == [
        "step 3/8  slow rank 5",
        "step 3/8  samples replaced",
        "step 4/8  resumed",
    ]
    assert texts(tmp_path, "events")[1:] == [(3, "    slow rank 5\n    samples replaced"), (4, "    resumed")]


def test_the_time_left_counts_validation_and_saves_as_they_came(tmp_path):
    now = [1000.0]
    stream = io.StringIO()
    log = Monitor(
        tmp_path, facts(total_steps=100), log_every_steps=4, stream=stream, first_step=0, clock=lambda: now[0]
    )
    for step in range(8):
        log.step(record(step))
        now[0] += 2 if step != 5 else 60
    log.close()
    at_1, at_4, at_8 = (re.search(r"eta +(\S+)", text)[1] for text in stream.getvalue().splitlines())
    assert (at_1, at_4) == ("-", "0:03:12")  # 96 steps of 2 s
    assert at_8 == "0:15:46"  # 92 steps of 72 / 7 s


def test_a_line_a_logged_step_and_no_more(tmp_path):
    stream = io.StringIO()
    log = monitor(tmp_path, every=3, stream=stream)
    for step in range(8):
        log.step(record(step))
    wait(log)
    assert re.findall(r"step (\d)/8", stream.getvalue()) == ["1", "3", "6", "8"]
    log.close()
    assert [line["step"] for line in lines(tmp_path, "step")] == [1, 3, 6, 8]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_loses_figures_and_nothing_else(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(event_files, "RETRY_S", 0.0)
    log = monitor(tmp_path, every=1)
    log.step(record(0))
    wait(log)
    before = lines(tmp_path)
    with full_disk((tmp_path / METRICS).stat().st_size + 100):
        for step in range(1, 4):
            log.step(record(step))
        wait(log)
    assert lines(tmp_path) == before  # no half line
    assert "training goes on" in caplog.text
    log.step(record(4))
    log.close()
    assert [line["step"] for line in lines(tmp_path, "step")] == [1, 5]
    assert (
        {1, 5} <= {step for step, _ in points(tmp_path, "loss/total")} <= {1, 3, 4, 5}
    )  # new files are small at first


def test_after_an_error_no_event_file_is_begun_before_a_minute_has_passed(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    files = event_files.EventFiles(tmp_path, 0)
    monkeypatch.setattr(files._writer, "flush", full)
    with pytest.raises(OSError, match="No space left"):
        files.scalars(1, {"loss/total": 1.0})
    with pytest.raises(OSError, match="no event file can be written in .* at the moment"):
        files.scalars(2, {"loss/total": 2.0})
    monkeypatch.setattr(event_files, "RETRY_S", 0.0)
    files.scalars(3, {"loss/total": 3.0})
    files.close()


def test_the_silent_monitor_takes_everything_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = silent_monitor()
    log.step(record(0))
    log.validation(1, {"validation/depth_loss": 0.1}, {"validation/diffusion_by_timestep": [0.1] * 10})
    log.event(1, "note")
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
