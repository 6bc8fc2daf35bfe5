"""What goes wrong on one rank, and what all ranks make of it."""

import os
import re
import shutil
import signal
import subprocess
from collections import defaultdict

import pytest
from forked_training import Fault, TrainingServer, read_trace
from packed_clips import damage_member
from tiny_training import make_data, write_config

from fw_train.build import world_params
from fw_train.checkpoint.layout import checkpoints_folder
from fw_train.checkpoint.loading import list_checkpoints, verify_checkpoint
from fw_train.config import load_config
from fw_train.monitoring.metrics_file import read_lines
from fw_train.monitoring.monitor import METRICS
from fw_train.run.data import open_data
from fw_train.run.folder import read_status
from fw_train.watch.watcher import FAILED, HUNG


@pytest.fixture(scope="module")
def server():
    with TrainingServer() as server:
        yield server


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_config(folder / "tiny.yaml", make_data(folder), "set run.output")


def train(server, config, folder, *changes, faults=(), size=2, **options):
    arguments = [config, f"run.output={folder / 'out'}", *changes]
    return server.run(arguments, size=size, folder=folder, faults=faults, check=False, **options)


def events(folder):
    return [line["text"] for line in read_lines(folder / "out" / METRICS) if line["kind"] == "event"]


def figures(folder, name):
    return [line[name] for line in read_lines(folder / "out" / METRICS) if line["kind"] == "step"]


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
@pytest.mark.parametrize(("kind", "told"), [("nan", "the loss is nan"), ("inf_gradient", "the gradient's norm is")])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_anywhere(server, config, tmp_path, kind, told, engine):
    outcomes = train(
        server, config, tmp_path, f"engine.kind={engine}", "train.steps=5", faults=[Fault(kind, 1, step=2)]
    )
    assert [outcome.returncode for outcome in outcomes] == [0, 0]
    for rank in (0, 1):
        trace = read_trace(tmp_path, rank)
        assert [line["applied"] for line in trace] == [True, True, False, True, True]
        assert [trace[2][name] for name in ("state", "weights", "optimiser_steps")] == [
            trace[1][name] for name in ("state", "weights", "optimiser_steps")
        ]
        assert trace[3]["state"] != trace[2]["state"]
    (event,) = events(tmp_path)
    assert told in event
    (skipped,) = [line for line in read_lines(tmp_path / "out" / METRICS) if line["kind"] == "skipped"]
    assert told in skipped["reason"]
    keys = read_trace(tmp_path, 1)[2]["keys"]
    assert ", ".join(keys) in event
    if kind == "nan":
        assert "rank 1: " + ", ".join(keys) + " (loss/" in event
    assert read_status(tmp_path / "out").state == "finished"


def test_a_poisoned_batch_that_comes_again_ends_the_run_with_its_samples(server, config, tmp_path):
    poison = Fault("nan", 1, step=2, last_step=7)
    outcomes = train(server, config, tmp_path, "guard.max_bad_steps=3", faults=[poison])
    assert all(outcome.returncode == FAILED for outcome in outcomes)
    assert [line["step"] for line in read_trace(tmp_path, 0)] == [0, 1, 2, 3]
    status = read_status(tmp_path / "out")
    assert status.state == "failed"
    assert "3 bad steps in a row" in status.reason
    assert all(read_trace(tmp_path, 1)[2]["keys"][0] in text for text in events(tmp_path)[:1])


def test_bad_steps_in_a_row_are_counted_on_after_a_resume(server, config, tmp_path):
    poison = Fault("nan", 1, step=2, last_step=7)
    first = train(server, config, tmp_path, "guard.max_bad_steps=3", "train.steps=4", faults=[poison])
    assert [outcome.returncode for outcome in first] == [0, 0]
    again = train(server, config, tmp_path, "guard.max_bad_steps=3", faults=[Fault("nan", 1, step=4)])
    assert all(outcome.returncode == FAILED for outcome in again)


def test_an_error_on_one_rank_ends_all_with_its_traceback_last(server, config, tmp_path):
    outcomes = train(server, config, tmp_path, faults=[Fault("raise", 1, step=1)])
    assert [outcome.returncode for outcome in outcomes] == [FAILED, FAILED]
    assert "rank 1 failed: ValueError: a fault was asked for" in outcomes[0].output
    assert "Traceback" not in outcomes[0].output
    assert outcomes[1].output.count("Traceback (most recent call last)") == 1
    assert outcomes[1].output.rstrip().endswith("ValueError: a fault was asked for")
    assert read_status(tmp_path / "out").state == "failed"


def test_out_of_memory_on_one_rank_ends_all_with_what_needs_less(server, config, tmp_path):
    outcomes = train(server, config, tmp_path, faults=[Fault("oom", 1, step=1)])
    assert [outcome.returncode for outcome in outcomes] == [FAILED, FAILED]
    assert "activation_checkpointing=full" in outcomes[1].output


def test_a_rank_that_hangs_is_named_with_its_stack_and_samples(server, config, tmp_path):
    hang = Fault("hang", 1, step=3)
    outcomes = train(server, config, tmp_path, "guard.hang_s=4", faults=[hang])
    assert [outcome.returncode for outcome in outcomes] == [HUNG, HUNG]
    told = outcomes[0].output + outcomes[1].output
    assert "hang_here" in told
    assert "rank 1" in read_status(tmp_path / "out").reason
    assert read_status(tmp_path / "out").state == "failed"


def test_a_stopped_process_is_named_with_where_it_was(server, config, tmp_path):
    arguments = [config, f"run.output={tmp_path / 'out'}", "guard.hang_s=4", "train.steps=100000"]
    run = server.start(arguments, size=2, folder=tmp_path)
    run.await_text(0, "4/100000  loss")
    run.signal(1, signal.SIGSTOP)
    outcomes = run.wait(60)
    assert outcomes[0].returncode == HUNG
    assert outcomes[1].returncode == -signal.SIGKILL  # by the rank that named it: it cannot leave by itself
    assert "rank 1" in outcomes[0].output
    assert "its stack at the last sign of life" in outcomes[0].output


@pytest.mark.parametrize(
    ("size", "who"), [(3, "of rank 1 differ from the others"), (2, "of ranks 0, 1 differ from each other")]
)
def test_a_weight_that_changed_on_one_rank_is_found(server, config, tmp_path, size, who):
    changes = ["train.global_batch=6", "guard.agree_every_steps=1"]
    outcomes = train(server, config, tmp_path, *changes, faults=[Fault("flip_weight", 1, step=2)], size=size)
    assert all(outcome.returncode == FAILED for outcome in outcomes)
    assert who in read_status(tmp_path / "out").reason


def test_a_frozen_weight_that_changed_is_found_before_it_is_saved(server, config, tmp_path):
    outcomes = train(server, config, tmp_path, faults=[Fault("flip_frozen", 1, step=4)])
    assert all(outcome.returncode == FAILED for outcome in outcomes)
    assert "frozen weights have changed on some ranks" in read_status(tmp_path / "out").reason
    assert all(checkpoint.step < 4 for checkpoint in list_checkpoints(checkpoints_folder(tmp_path / "out")))


def test_a_folder_that_another_start_took_over_is_not_written_any_more(server, config, tmp_path):
    arguments = [config, f"run.output={tmp_path / 'out'}", "train.steps=100000"]
    run = server.start(arguments, size=1, folder=tmp_path)
    run.await_text(0, "4/100000  loss")
    (tmp_path / "out" / ".lease" / "2").write_text("another start")
    (outcome,) = run.wait(60)
    assert outcome.returncode == FAILED
    assert "was taken over by another start; this one must not write there any more" in outcome.output
    assert read_status(tmp_path / "out").state == "running"


def test_a_slow_rank_is_named(server, config, tmp_path):
    slow = Fault("slow", 1, step=0, last_step=24)
    train(server, config, tmp_path, "train.steps=24", faults=[slow])
    assert any(text.startswith("rank 1 is slow") for text in events(tmp_path))


@pytest.fixture
def packed(config, tmp_path):
    """A copy of the data, to be damaged."""
    return shutil.copytree(config.parent / "packed", tmp_path / "packed")


def from_here(packed):
    return f"data.sources=[{{path: {packed}}}]"


def drawn(config, packed, steps):
    """The samples that each of two ranks trains on, by step and rank."""
    settings, keys = load_config(config, [from_here(packed)]), defaultdict(list)
    data = open_data(settings, world_params(settings).wan)
    for rank in (0, 1):
        for batch in data.batches([(0, settings.train.global_batch)], 0, steps, rank=rank, world=2, micro_batch=1):
            keys[batch.step, rank] += batch.keys
    return keys


def test_a_corrupt_sample_has_a_substitute_that_all_ranks_count(server, config, packed, tmp_path):
    keys = drawn(config, packed, steps=3)
    corrupt = keys[1, 1][0]
    damage_member(packed, corrupt)
    outcomes = train(server, config, tmp_path, from_here(packed), "train.steps=3")
    assert [outcome.returncode for outcome in outcomes] == [0, 0]
    assert f"sample {corrupt} cannot be read" not in outcomes[0].output
    assert f"sample {corrupt} cannot be read, another of its stream takes its place" in outcomes[1].output
    assert "a line for it in quarantine.jsonl leaves it out for good" in outcomes[1].output
    (event,) = events(tmp_path)
    assert event.startswith(f"samples that cannot be read: {corrupt} (")
    assert figures(tmp_path, "samples/substituted_samples") == [0, 1, 1]
    ours, theirs = (read_trace(tmp_path, rank) for rank in (0, 1))
    assert [line["losses"] for line in ours] == [line["losses"] for line in theirs]
    assert [line["weights"] for line in ours] == [line["weights"] for line in theirs]
    trained = {(line["step"], rank): line["keys"] for rank, trace in enumerate((ours, theirs)) for line in trace}
    assert [place for place in keys if trained[place] != keys[place]] == [(1, 1)]
    assert corrupt not in trained[1, 1]
    assert trained[1, 1][1:] == keys[1, 1][1:]


def test_too_many_corrupt_samples_end_the_run_although_each_rank_has_but_one(server, config, packed, tmp_path):
    """One is borne whatever the share: it takes the count over both ranks to see the second."""
    saved = train(server, config, tmp_path, from_here(packed), "train.steps=3")
    assert [outcome.returncode for outcome in saved] == [0, 0]
    keys = drawn(config, packed, steps=4)
    unlucky = [keys[3, rank][-1] for rank in (0, 1)]  # their substitutes are whole
    for key in unlucky:
        damage_member(packed, key)
    outcomes = train(server, config, tmp_path, from_here(packed), "data.max_substituted=0", name="damaged")
    assert [(outcome.returncode, outcome.timed_out) for outcome in outcomes] == [(FAILED, False)] * 2
    reason = re.compile(
        r"2 of \d+ samples could not be read, more than data\.max_substituted=0; check the data with `fw data verify`"
    )
    status = read_status(tmp_path / "out")
    assert status.state == "failed"
    assert all(reason.search(told) for told in (status.reason, *(outcome.output for outcome in outcomes)))
    assert all(key in events(tmp_path)[-1] for key in unlucky)
    assert not (tmp_path / "damaged-0.trace").exists()  # no step was finished
    last = list_checkpoints(checkpoints_folder(tmp_path / "out"))[0]
    assert last.step == 3
    assert verify_checkpoint(last.path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint_and_training_goes_on(server, config, small_disk, tmp_path):
    (outcome,) = server.run(
        [config, f"run.output={small_disk / 'out'}", "run.keep_last=5", "train.steps=12", "run.save_every_steps=2"],
        size=1, folder=tmp_path, check=False,
    )  # fmt: skip
    assert outcome.returncode == FAILED
    assert "could not be saved" in outcome.output
    assert "are free at" in outcome.output
    assert [line["step"] for line in read_trace(tmp_path)] == list(range(12))
    kept = list_checkpoints(checkpoints_folder(small_disk / "out"))
    assert 2 <= kept[0].step < 12
    assert verify_checkpoint(kept[0].path) == []
