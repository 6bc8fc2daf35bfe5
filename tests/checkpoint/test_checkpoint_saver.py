"""Saving beside training: what the copy protects, failing disks, ranks that fail or do not come, and giving up in time."""

import errno
import logging
import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_samples import (
    SHAPES,
    blank,
    flat_fragments,
    gathered,
    row_fragments,
    run_state,
    same,
    stage_info,
    values,
)
from forked_ranks import alone, run_ranks

import fw_train.checkpoint.saver as saver_module
import fw_train.checkpoint.writing as writing
from fw_train import dist
from fw_train.checkpoint.loading import list_checkpoints, load, verify_checkpoint
from fw_train.checkpoint.run_state import capture_rng
from fw_train.checkpoint.saver import CheckpointSaver, CheckpointsFailing, SaveParams, StageWeights
from fw_train.weights.files import CheckpointError
from processes import run_function

STATE = values(SHAPES, 1)


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def make(output, clock=None, world=None, **params):
    params = {"every_steps": 10, "deadline_s": 20.0, **params}
    return CheckpointSaver(output, world or alone(), SaveParams(**params), clock=clock or Clock())


def start(saver, step, state=STATE, world=None, weights=None):
    world = world or alone()
    return saver.save(step, flat_fragments(SHAPES, state, world.rank, world.size), run_state(step, world.size), weights)


def steps(output):
    return [checkpoint.step for checkpoint in list_checkpoints(output / "checkpoints")]


def in_the_way(saver, monkeypatch):
    """An event that the writing thread waits for before it writes."""
    event = threading.Event()
    real = saver_module.write_rank

    def held(*args):
        event.wait(20)
        real(*args)

    monkeypatch.setattr(saver_module, "write_rank", held)
    return event


def test_training_goes_on_and_does_not_reach_what_is_being_saved(tmp_path, monkeypatch):
    saver = make(tmp_path)
    go = in_the_way(saver, monkeypatch)
    fragments = flat_fragments(SHAPES, STATE, 0, 1)
    trained = torch.ones(8, 5, dtype=torch.bfloat16)
    state = run_state(10, guard={"window": [1.0]})
    assert saver.save(10, fragments, state, StageWeights({"geo.weight": trained}, stage_info(10))).started
    for fragment in fragments:
        fragment.master.detach().zero_(), fragment.exp_avg.zero_(), fragment.exp_avg_sq.zero_()
    trained.zero_()
    state.guard["window"].append(2.0)
    assert steps(tmp_path) == []
    go.set()
    saver.wait()
    filled = flat_fragments(SHAPES, blank(SHAPES), 0, 1)
    assert load(tmp_path, "latest", filled, alone()).guard == {"window": [1.0]}
    assert same(gathered([filled]), STATE)
    assert verify_checkpoint(tmp_path / "checkpoints" / "step-10") == []
    assert (tmp_path / "step-10.safetensors").read_bytes()[-80:] == b"\x80\x3f" * 40


def test_host_memory_is_reused(tmp_path):
    host = writing.HostCopies()
    fragments = flat_fragments(SHAPES, STATE, 0, 1)
    first = host.flat(fragments).data_ptr()
    assert host.flat(fragments).data_ptr() == first
    assert host.named({"a": torch.ones(3)})["a"].data_ptr() == host.named({"a": torch.zeros(3)})["a"].data_ptr()


def test_a_save_during_a_save_is_put_off_and_made_up_for(tmp_path, monkeypatch, caplog):
    saver = make(tmp_path)
    go = in_the_way(saver, monkeypatch)
    assert saver.due(10, 1000.0)
    assert start(saver, 10).started
    assert not saver.due(20, 1000.0), "while it is written, rank 0 does not ask for the next"
    with caplog.at_level(logging.WARNING):
        assert not start(saver, 20).started
    assert "step 20 is not saved now: the save before is still being written by the ranks [0]" in caplog.text
    assert saver.poll() is None
    go.set()
    assert saver.wait().step == 10
    assert saver.poll().step == 10
    assert saver.poll() is None, "each outcome is told once"
    assert saver.due(21, 1000.0), "step 20 is made up for"
    assert start(saver, 21).started
    saver.wait()
    assert steps(tmp_path) == [21, 10]


def failing(code, part):
    """A disk that refuses to sync whatever `part` is in the name of."""
    real = os.fsync

    def sync(descriptor):
        if part in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    return sync


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("part", ["rank-00000.safetensors", ".rank-00000.json", "step-20.safetensors", "manifest"])
def test_a_disk_that_fails(tmp_path, monkeypatch, caplog, code, part):
    """The last good checkpoint stays, nothing else does, it is said once, and the next attempt comes after the pause."""
    clock = Clock()
    saver = make(tmp_path, clock, retry_s=60.0)
    weights = StageWeights({"geo.weight": torch.ones(8, 5, dtype=torch.bfloat16)}, stage_info(10))
    start(saver, 10, weights=weights)
    assert saver.wait().error == ""
    monkeypatch.setattr(os, "fsync", failing(code, part))
    with caplog.at_level(logging.ERROR):
        start(saver, 20, weights=weights)
        outcome = saver.wait()
    assert outcome.path is None
    assert os.strerror(code) in outcome.error
    assert len(caplog.records) == 1
    for said in (os.strerror(code), "GB are free at", "the last good checkpoint is", "step-10", "after 60 s"):
        assert said in caplog.text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-10"]
    assert verify_checkpoint(tmp_path / "checkpoints" / "step-10") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "step-10.safetensors"]

    assert not saver.due(30, clock.now_s + 59)
    clock.now_s += 60
    assert saver.due(31, clock.now_s)
    monkeypatch.undo()
    start(saver, 31)
    assert saver.wait().error == ""
    assert steps(tmp_path) == [31, 10]


def test_a_run_that_cannot_save_goes_on_for_so_long_and_then_ends(tmp_path, monkeypatch):
    clock = Clock()
    saver = make(tmp_path, clock, retry_s=60.0, max_unsaved_s=300.0)
    start(saver, 10)
    saver.wait()
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC, "rank-00000"))
    for step in range(20, 25):
        assert saver.due(step, clock.now_s)
        assert start(saver, step).started
        assert saver.wait().path is None
        clock.now_s += 70
    with pytest.raises(
        CheckpointsFailing,
        match=r"for 350 s \(5 attempts failed\); .* GB are free .*step-10: free some space and resume",
    ):
        start(saver, 25)
    assert steps(tmp_path) == [10]


def test_the_time_counts_anew_after_a_save_that_went_well(tmp_path, monkeypatch):
    clock = Clock()
    saver = make(tmp_path, clock, retry_s=60.0, max_unsaved_s=300.0)
    for step in range(10, 60, 10):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(errno.ENOSPC, "rank-00000"))
            start(saver, step)
            assert saver.wait().path is None
        clock.now_s += 200
        start(saver, step + 1)
        assert saver.wait().path


def test_a_hung_disk_ends_the_run_in_time(tmp_path, monkeypatch):
    clock = Clock()
    saver = make(tmp_path, clock, max_unsaved_s=300.0)
    go = in_the_way(saver, monkeypatch)
    start(saver, 10)
    clock.now_s += 299
    assert not saver.due(20, clock.now_s)
    clock.now_s += 2
    assert saver.due(21, clock.now_s)
    with pytest.raises(CheckpointsFailing, match="no checkpoint could be written for 301 s"):
        start(saver, 21)
    go.set()
    saver.wait()


def test_what_will_not_fit_is_not_begun(tmp_path, monkeypatch, caplog):
    saver = make(tmp_path)
    usage = type("Usage", (), {"free": 500})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert not start(saver, 10).started
    assert "0.000 GB are needed and 0.000 GB are free" in caplog.text
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("preflight", [True, False])
def test_a_disk_that_is_full(small_disk, monkeypatch, caplog, preflight):
    """Two checkpoints do not fit: the first stays whole until the file that fills the disk is gone."""
    if not preflight:  # other jobs fill it between the look and the write
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
    shapes = {"w": (200, 200)}
    state, new = values(shapes, 1), values(shapes, 2)
    output, clock = small_disk / "run", Clock()
    saver = make(output, clock, keep_last=1)

    def attempt(step, state):
        fragments = flat_fragments(shapes, state, 0, 1)
        saver.save(step, fragments, run_state(step), StageWeights({"w": state["w"][0]}, info))
        return saver.wait()

    info = stage_info(1)._replace(dtype=torch.float32)
    other = small_disk / "other"
    assert attempt(10, state).path == output / "checkpoints" / "step-10"
    other.write_bytes(b"\0" * 1_000_000)
    for step in (20, 30):
        outcome = attempt(step, new)
        assert outcome.path is None
        assert ("are needed" if preflight else "No space left on device") in outcome.error
        assert steps(output) == [10]
        assert verify_checkpoint(output / "checkpoints" / "step-10") == []
        assert sorted(path.name for path in output.iterdir()) == ["checkpoints", "step-10.safetensors"]
    other.unlink()
    assert attempt(40, new).path == output / "checkpoints" / "step-40"
    assert verify_checkpoint(output / "checkpoints" / "step-40") == []
    assert steps(output) == [40]


def save_with_a_failing_rank(world, output, failing_rank):
    if world.rank == failing_rank:
        os.fsync = failing(errno.ENOSPC, f"rank-{failing_rank:05d}.safetensors")
    saver = make(output, world=world)
    first = start(saver, 10, world=world).started
    failed = saver.wait()
    return first, failed.path, failed.error, os.listdir(output / "checkpoints")


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_failure_of_one_rank_is_the_failure_of_all(tmp_path, rank):
    results = run_ranks(3, lambda world: save_with_a_failing_rank(world, tmp_path, rank))
    assert len({tuple(map(str, result[:3])) for result in results}) == 1, "all know the same"
    for started, path, error, left in results:
        assert started
        assert path is None
        assert "No space left on device" in error
        assert (f"rank {rank}" in error) == (rank != 0)
        assert left == []


def test_what_is_given_up_takes_no_more_files(tmp_path, monkeypatch):
    """Another rank may still be writing: what it makes after the removal has begun would stay for ever."""
    staging, removed = tmp_path / ".staging-a-1", []
    staging.mkdir()

    def remove(path, **_):
        with pytest.raises(FileNotFoundError):
            (staging / "rank-00001.safetensors").touch()
        removed.append(path)

    monkeypatch.setattr("shutil.rmtree", remove)
    writing.give_up(staging)
    assert removed
    writing.report_failure(staging, 1, "no space")
    assert not staging.exists()


def save_without_a_rank(world, output):
    if world.rank == 1:
        saver_module.write_rank = lambda *_: None  # it hangs, as far as the others can tell
    saver = make(output, world=world, deadline_s=0.2)
    start(saver, 10, world=world)
    return saver.wait().error


def test_a_rank_that_does_not_come_is_named(tmp_path):
    errors = run_ranks(2, lambda world: save_without_a_rank(world, tmp_path))
    assert errors == ["OSError: the ranks [1] have not written within 0 s"] * 2


def save_gaps(world, output):
    saver = make(output, world=world)
    fragments = flat_fragments(SHAPES, STATE, 0, 2)  # both ranks the same half
    saver.save(10, fragments, run_state(10, 2))
    return saver.wait().error


def test_fragments_that_do_not_make_up_the_parameters_are_not_committed(tmp_path):
    errors = run_ranks(2, lambda world: save_gaps(world, tmp_path))
    assert "the ranks' fragments do not make up the parameters: " in errors[0]
    assert "geo.weight: element 0 is held twice" in errors[0]


def see_another_folder(world, output):
    try:
        make(output / str(world.rank), world=world)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_folder_that_is_not_shared(tmp_path):
    for error in run_ranks(2, lambda world: see_another_folder(world, tmp_path)):
        assert "is not the same folder for all ranks: rank 1 on " in error


def test_a_state_that_is_not_json_or_of_another_step(tmp_path):
    saver = make(tmp_path)
    fragments = flat_fragments(SHAPES, STATE, 0, 1)
    for guard in ({"loss": float("nan")}, {"loss": torch.ones(1)}, {"loss": {1, 2}}):
        with pytest.raises(CheckpointError, match="not plain JSON"):
            saver.save(10, fragments, run_state(10, guard=guard))
    with pytest.raises(CheckpointError, match="the state of step 9 on 1 ranks cannot be saved as step 10 on 1"):
        saver.save(10, fragments, run_state(9))
    with pytest.raises(CheckpointError, match="one-dimensional fp32"):
        saver.save(10, [fragments[0]._replace(exp_avg=fragments[0].exp_avg.double())], run_state(10))
    wrong = StageWeights({"a": torch.ones(1)}, stage_info(10))
    with pytest.raises(CheckpointError, match="one dtype"):
        saver.save(10, fragments, run_state(10), wrong)


def test_a_second_run_in_the_folder_goes_on_counting(tmp_path):
    for step in (10, 20, 5):
        saver = make(tmp_path)
        start(saver, step)
        saver.wait()
    assert steps(tmp_path) == [5, 20, 10], "by the order of saves, whatever the steps and the clocks say"
    for number, checkpoint in enumerate(list_checkpoints(tmp_path / "checkpoints")):
        os.utime(checkpoint.path, (number * 1e6, number * 1e6))
    assert steps(tmp_path) == [5, 20, 10]


def test_checkpoints_take_little_more_than_their_numbers(tmp_path):
    shapes = {f"block.{n}.weight": (512, 700) for n in range(4)}
    state = values(shapes, 1)
    weights = StageWeights({name: rows[0].bfloat16() for name, rows in state.items()}, stage_info(10))
    saver = make(tmp_path)
    saver.save(10, flat_fragments(shapes, state, 0, 1), run_state(10, rng=capture_rng()), weights)
    saver.wait()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size <= 1.05 * 4 * 512 * 700 * (2 + 4 + 4 + 4)


def over_gloo(output):
    world = dist.start(20)
    saver = CheckpointSaver(Path(output), world, SaveParams())
    fragments = flat_fragments(SHAPES, STATE, world.rank, world.size)
    started = saver.save(3, fragments, run_state(3, world.size))
    outcome = saver.wait()
    filled = row_fragments(SHAPES, blank(SHAPES), world.rank, world.size)
    state = load(Path(output), "auto", filled, world)
    expected = row_fragments(SHAPES, STATE, world.rank, world.size)
    equal = all(torch.equal(a.master, b.master) and torch.equal(a.exp_avg_sq, b.exp_avg_sq)
                for a, b in zip(filled, expected, strict=True))  # fmt: skip
    return [started.started, str(outcome.path), state.step, equal]


def test_over_gloo(tmp_path):
    results = run_function(over_gloo, str(tmp_path), size=2)
    assert results == [[True, str(tmp_path / "checkpoints" / "step-3"), 3, True]] * 2
