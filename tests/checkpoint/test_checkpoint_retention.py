"""What stays: by a pure plan, tried on random histories, and on disk."""

import shutil

import pytest
from checkpoint_samples import SHAPES, flat_fragments, run_state, stage_info, values
from forked_ranks import alone
from hypothesis import given
from hypothesis import strategies as st

from fw_train.checkpoint.layout import MANIFEST, list_checkpoints
from fw_train.checkpoint.retention import plan_retention, remove_superseded
from fw_train.checkpoint.saver import CheckpointSaver, SaveParams, StageWeights

STATE = values(SHAPES, 1)


@given(
    steps=st.lists(st.integers(0, 200), unique=True),
    keep_last=st.integers(0, 5),
    keep_every=st.integers(0, 20),
    protected=st.sets(st.integers(0, 200)),
)
def test_the_plan(steps, keep_last, keep_every, protected):
    going = plan_retention(steps, keep_last, keep_every, protected)
    assert going <= set(steps)
    assert not going & (set(steps[: max(1, keep_last)]) | protected), "the latest always stays"
    assert all(keep_every == 0 or step % keep_every for step in going)
    stays = [step for step in steps if step not in going]
    assert plan_retention(stays, keep_last, keep_every, protected) == set(), "a second look removes nothing more"
    assert len(stays) <= max(1, keep_last) + len(protected) + sum(
        not keep_every or s % keep_every == 0 for s in steps
    ) * (keep_every > 0)


def test_the_plan_goes_by_the_order_of_saves_and_not_by_steps():
    assert plan_retention([150, 100, 300, 200], keep_last=2) == {300, 200}


def save(output, step, keep_last=99, keep_every=0):
    saver = CheckpointSaver(output, alone(), SaveParams(keep_last=keep_last, keep_every=keep_every))
    weights = StageWeights({"geo.weight": STATE["geo.weight"][0].bfloat16()}, stage_info(step))
    saver.save(step, flat_fragments(SHAPES, STATE, 0, 1), run_state(step), weights)
    assert saver.wait().path


def there(output):
    return [checkpoint.step for checkpoint in list_checkpoints(output / "checkpoints")]


def test_checkpoints_and_their_weights_go_together(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert there(tmp_path) == [7, 6, 3]
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [f"step-{n}.safetensors" for n in (3, 6, 7)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-3", "step-6", "step-7"]


def test_a_run_that_went_back_keeps_what_it_saved_last(tmp_path):
    """From step 1 again, after 3: the newer branch is the latest although its steps are smaller."""
    for step in (1, 2, 3, 2):
        save(tmp_path, step)
    assert there(tmp_path) == [2, 3, 1]
    save(tmp_path, 1, keep_last=2)
    assert there(tmp_path) == [1, 2]


def test_damaged_checkpoints_neither_count_nor_go(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-4" / "rank-00000.safetensors").unlink()
    (tmp_path / "checkpoints" / "step-3" / MANIFEST).write_text("{}")
    removed = remove_superseded(tmp_path / "checkpoints", keep_last=1)
    assert [checkpoint.step for checkpoint in removed] == [1]
    assert there(tmp_path) == [2]
    assert (tmp_path / "checkpoints" / "step-4").is_dir()
    assert (tmp_path / "checkpoints" / "step-3").is_dir()


def test_a_removal_that_fails_half_way_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_superseded(tmp_path / "checkpoints", keep_last=1)
    monkeypatch.undo()
    assert there(tmp_path) == [2]
    save(tmp_path, 3)
    assert not list((tmp_path / "checkpoints").glob(".*")), "the next save removes the rest"
