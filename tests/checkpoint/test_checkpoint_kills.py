"""A save that is killed at any file operation, or loses power there, leaves the old checkpoint or the new one."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from checkpoint_samples import SHAPES, blank, flat_fragments, gathered, run_state, same, stage_info, values
from file_operations import PowerCut, killed_at, logged_to
from forked_ranks import DIED, alone, run_ranks

from fw_train.checkpoint.layout import scan
from fw_train.checkpoint.loading import load
from fw_train.checkpoint.saver import CheckpointSaver, SaveParams, StageWeights
from fw_train.weights.stage import read_stage_info

OLD, NEW = values(SHAPES, 1), values(SHAPES, 2)
RANKS = 2


def save(output, world, step, state, deadline_s=20, keep_last=1):
    """A save that also removes the one before it."""
    saver = CheckpointSaver(output, world, SaveParams(keep_last=keep_last, deadline_s=deadline_s))
    fragments = flat_fragments(SHAPES, state, world.rank, world.size)
    weights = StageWeights({"geo.weight": state["geo.weight"][0].bfloat16()}, stage_info(step))
    saver.save(step, fragments, run_state(step, world.size), weights if world.rank == 0 else None)
    return saver.wait()


def loaded(output):
    """The step and values that the next start finds, without any tolerance for damage."""
    fragments = flat_fragments(SHAPES, blank(SHAPES), 0, 1)
    state = load(output, "latest", fragments, alone())
    return state.step, gathered([fragments])


@pytest.fixture(params=[5, 4], ids=["the next step", "the same step again"])
def new_step(request):
    return request.param


@pytest.fixture
def place():
    """In memory where possible: syncing to a disk hundreds of times takes longer than everything else."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def before(place):
    output = place / "before"
    output.mkdir()
    run_ranks(RANKS, lambda world: save(output, world, 4, OLD))
    assert same(loaded(output)[1], OLD)
    return output


def old_or_new(output, new_step):
    step, state = loaded(output)
    is_new = same(state, NEW)
    assert is_new or same(state, OLD), "a mix"
    assert step == (new_step if is_new else 4)
    assert scan(output / "checkpoints").damaged == []
    for weights in output.glob("*.safetensors"):
        assert read_stage_info(weights).step in (4, new_step)
    return is_new


@pytest.mark.parametrize("victim", range(RANKS))
def test_killed_at_every_file_operation(place, before, new_step, victim):
    def saved_with(kill, deadline_s):
        """Of a copy of the folder: what became of each rank, and what the next start finds."""
        output = Path(tempfile.mkdtemp(dir=place)) / "output"
        shutil.copytree(before, output)

        def work(world):
            with killed_at(kill if world.rank == victim else -1) as operations:
                save(output, world, new_step, NEW, deadline_s)
                return operations.count

        return output, run_ranks(RANKS, work)[victim]

    output, count = saved_with(kill=-1, deadline_s=20)
    assert old_or_new(output, new_step)
    seen = set()
    for number in range(count):
        output, result = saved_with(number, deadline_s=0.1)
        assert result == DIED
        seen.add(old_or_new(output, new_step))
        # The next run saves, and leaves nothing of the killed one.
        assert save(output, alone(), 6, OLD).path
        assert sorted(path.name for path in output.rglob("*")) == sorted(
            [
                "checkpoints",
                "step-6",
                "manifest.json",
                "rank-00000.json",
                "rank-00000.safetensors",
                "step-6.safetensors",
            ]
            + [f"step-{new_step}.safetensors"] * (output / f"step-{new_step}.safetensors").exists()
        )
    assert count > (40 if victim == 0 else 8)
    # The index is the last that others than rank 0 do: before it there is no new checkpoint.
    assert seen == ({False, True} if victim == 0 else {False})


@pytest.mark.parametrize("keep_last", [1, 2])
def test_power_is_lost_after_every_file_operation(place, before, new_step, keep_last):
    output, log = place / "output", place / "log"
    shutil.copytree(before, output)

    def work(world):
        with logged_to(log):
            return save(output, world, new_step, NEW, keep_last=keep_last)

    results = run_ranks(RANKS, work)
    assert all(path and not error for _, path, _, _, error in results)
    operations = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(operations) > 40

    disk, seen = PowerCut(before), []
    moved = [[what, *(text.replace(str(output), str(before)) for text in rest)] for what, *rest in operations]
    for number, operation in enumerate(moved):
        disk.apply(operation)
        for survive_from in range(4):  # all folders' last names, those in `checkpoints`, in one checkpoint, none
            after = place / f"after-{number}-{survive_from}"
            disk.write(after, survive_from)
            seen.append(old_or_new(after, new_step))
            shutil.rmtree(after)
    assert set(seen) == {False, True}
    assert seen[-1], "what a save reported as done is on the disk"
