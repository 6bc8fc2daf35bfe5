"""The sequence of samples: the same for any number of processes and ranks, through kills and resumes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_clips import make_packed

from fw_train.data import loader
from fw_train.data.loader import Augmentation, LoaderParams, SourceParams, TrainingData, too_many
from fw_train.data.order import SampleOrder, change_global_batch

SIZES = (32, 48), (48, 32)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_packed(tmp_path_factory.mktemp("loader"), kinds=("latent", "text"))


def params(workers=0, **changes):
    given = {"frames": 5, "sizes_px": SIZES, "latents": "sidecar", "members": ("latent", "text"), "labels": False}
    return LoaderParams(**{**given, "text_tokens": 4, "workers": workers, "timeout_s": 60, **changes})


def open_data(folder, workers=0, seed=0, **changes):
    return TrainingData([SourceParams(str(folder), name="clips")], params(workers, **changes), seed)


def sequence(data, segments, first, last, world=1, micro_batch=1):
    """(position, key, first number of the latents) of every sample, in the global order."""
    found = {}
    for rank in range(world):
        for batch in data.batches(segments, first, last, rank=rank, world=world, micro_batch=micro_batch):
            for position, sample in zip(batch.position.tolist(), batch.samples, strict=True):
                assert position not in found
                found[position] = batch.step, sample.key, sample.encoded["latent"].flatten()[0].item()
    return sorted(found.items())


def test_the_sequence_does_not_depend_on_processes_or_ranks(packed):
    alone = sequence(open_data(packed), [(0, 4)], 0, 5)
    assert [position for position, _ in alone] == list(range(20))
    data = open_data(packed)
    keys = {data.sources[0].dataset.sample(row).key: float(row) for row in range(8)}
    assert all(keys[key] == number for _, (_, key, number) in alone)
    for workers, world, micro_batch in ((1, 1, 2), (2, 1, 1), (2, 2, 1), (0, 4, 1), (1, 2, 2)):
        found = sequence(open_data(packed, workers), [(0, 4)], 0, 5, world, micro_batch)
        assert found == alone, (workers, world, micro_batch)


def test_the_sequence_is_that_of_the_order(packed):
    data = open_data(packed, seed=7)
    order = SampleOrder(7, data.streams, [(0, 4)])
    for step in range(4):
        stream, ids, positions = order.step_ids(step)
        (batch,) = data.batches([(0, 4)], step, step + 1, rank=0, world=1, micro_batch=4)
        assert batch.position.tolist() == positions.tolist()
        dataset = data.sources[data.source_of(stream)].dataset
        assert batch.keys == tuple(dataset.sample(row).key for row in data.rows(stream)[ids])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    split=st.sampled_from(
        [(world, micro) for world in (1, 2, 3, 4, 6, 12) for micro in (1, 2, 3) if 12 % (world * micro) == 0]
    ),
    first=st.integers(0, 50),
)
def test_any_split_of_a_step_over_ranks_gives_the_same_samples(packed, seed, split, first):
    data = open_data(packed, seed=seed)
    whole = sequence(data, [(0, 12)], first, first + 2, 1, 12)
    assert sequence(data, [(0, 12)], first, first + 2, *split) == whole


def test_from_64_to_112_ranks_in_mid_epoch_nothing_changes(packed):
    data = open_data(packed)
    segments = [(0, 448)]
    uninterrupted = sequence(data, segments, 0, 2, 1, 448)
    assert sequence(data, segments, 0, 1, 64, 7) + sequence(data, segments, 1, 2, 112, 4) == uninterrupted


def test_two_kills_and_resumes_give_the_uninterrupted_sequence(packed):
    segments = [(0, 4)]
    whole = sequence(open_data(packed), segments, 0, 9)
    found, start = [], 0
    for stop, workers in ((3, 2), (4, 1), (9, 0)):
        data = open_data(packed, workers)
        batches = data.batches(segments, start, 9, rank=0, world=1, micro_batch=2)
        for batch in batches:
            if batch.step == stop:
                break  # as a kill leaves it: batches were read ahead
            for position, sample in zip(batch.position.tolist(), batch.samples, strict=True):
                found.append((position, (batch.step, sample.key, sample.encoded["latent"].flatten()[0].item())))
        batches.close()
        start = stop
    assert found == whole


def test_another_global_batch_from_a_step_on(packed):
    segments = change_global_batch([(0, 4)], 2, 6)
    data = open_data(packed)
    found = sequence(data, segments, 0, 4, 2)
    assert [position for position, _ in found] == list(range(20))
    assert found[:8] == sequence(data, [(0, 4)], 0, 2)


def children():
    for _ in range(50):
        if not multiprocessing.active_children():
            return []
        time.sleep(0.1)
    return multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_server_of_processes_imports_while_the_tables_are_opened(packed, monkeypatch, workers):
    begun, opens = [], loader.open_streams
    monkeypatch.setattr(loader.forkserver, "ensure_running", lambda: begun.append("server"))
    monkeypatch.setattr(loader, "open_streams", lambda *words: begun.append("tables") or opens(*words))
    open_data(packed, workers)
    assert begun == ["server"] * workers + ["tables"]


def test_closing_early_ends_the_processes(packed):
    batches = open_data(packed, 2).batches([(0, 4)], 0, 1000, rank=0, world=1, micro_batch=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert children() == []


def test_processes_leave_the_global_random_state_alone(packed):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    list(open_data(packed, 1).batches([(0, 4)], 0, 1, rank=0, world=1, micro_batch=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_killed_trainer_takes_its_processes_along(packed, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, time, multiprocessing\n"
        "from fw_train.data.loader import *\n"
        "if __name__ == '__main__':\n"
        f"    params = LoaderParams(5, {SIZES}, 'sidecar', ('latent', 'text'), labels=False, workers=2)\n"
        f"    data = TrainingData([SourceParams({str(packed)!r})], params, 0)\n"
        "    batches = data.batches([(0, 4)], 0, 10**6, rank=0, world=1, micro_batch=1)\n"
        "    next(batches)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(100)\n"
    )
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_gives_nothing_in_time_ends_the_run(packed):
    batches = open_data(packed, 1, timeout_s=2).batches([(0, 4)], 0, 10**6, rank=0, world=1, micro_batch=1)
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RuntimeError, match="gave no batch for 2 s; raise data.timeout_s"):
            consume(batches)
    finally:
        os.kill(child.pid, signal.SIGKILL)
    assert children() == []


def consume(batches):
    for _ in batches:
        pass


def test_the_limit_of_substitutes():
    assert not too_many(0, 0, 1e-3)
    assert not too_many(1, 1, 1e-3)
    assert too_many(2, 100, 1e-3)
    assert not too_many(10, 10_000, 1e-3)
    assert too_many(11, 10_000, 1e-3)
    assert too_many(2, 10**9, 0)


def test_augmentation_that_latents_do_not_follow_is_refused(packed):
    for change in ({"flip": 0.5}, {"random_crop": True}, {"max_temporal_stride": 2}, {"colour_jitter": 0.1}):
        (name,) = change
        with pytest.raises(ValueError, match=rf"augmentation \({name}\) does not reach latent"):
            open_data(packed, augmentation=Augmentation(**change))
        online = {"latents": "online", "members": ("text",)}
        assert open_data(packed, augmentation=Augmentation(**change), **online).streams
