"""Saving and loading on one rank and on several: same bits whatever split, and refusals before anything is touched."""

import itertools

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

from fw_train.checkpoint.loading import load, peek, verify_checkpoint
from fw_train.checkpoint.saver import CheckpointSaver, SaveParams, StageWeights
from fw_train.weights.files import CheckpointError, open_checkpoint
from fw_train.weights.stage import read_stage_info


def save(output, world, step, fragments, weights=None, params=None, **changes):
    saver = CheckpointSaver(output, world, params or SaveParams())
    state = run_state(step, world.size, rng={"torch": f"rank {world.rank}"}, **changes)
    assert saver.save(step, fragments, state, weights).started
    return saver.wait()


def saved(output, step, state, ranks=1, split=flat_fragments, padding=0):
    def work(world):
        fragments = split(SHAPES, state, world.rank, world.size, *([padding] if padding else []))
        return save(output, world, step, fragments)

    outcomes = run_ranks(ranks, work) if ranks > 1 else [work(alone())]
    assert all(outcome[1] and not outcome[4] for outcome in outcomes), outcomes


def loaded(output, ranks, split, which="latest"):
    """Values and state as `ranks` ranks load them."""

    def work(world):
        fragments = split(SHAPES, blank(SHAPES), world.rank, world.size)
        state = load(output, which, fragments, world)
        return [state.step, state.world_size, state.rng], [
            (f.name, f.start, f.master.tolist(), f.exp_avg.tolist(), f.exp_avg_sq.tolist()) for f in fragments
        ]

    results = run_ranks(ranks, work)
    whole = blank(SHAPES)
    for _, fragments in results:
        for name, start, *rows in fragments:
            whole[name][:, start : start + len(rows[0])] = torch.tensor(rows)
    return whole, [state for state, _ in results]


def test_a_save_and_a_load_on_one_rank(tmp_path):
    state, tensors = values(SHAPES, 1), {"geo.weight": torch.randn(8, 5).bfloat16()}
    outcome = save(tmp_path, alone(), 7, flat_fragments(SHAPES, state, 0, 1), StageWeights(tensors, stage_info(7)))
    assert outcome.path == tmp_path / "checkpoints" / "step-7"
    fragments = flat_fragments(SHAPES, blank(SHAPES), 0, 1)
    assert load(tmp_path, "latest", fragments, alone()) == run_state(7, rng={"torch": "rank 0"})
    assert same({f.name: torch.stack((f.master, f.exp_avg, f.exp_avg_sq)) for f in fragments}, state)
    assert read_stage_info(tmp_path / "step-7.safetensors") == stage_info(7)
    assert torch.equal(open_checkpoint(tmp_path / "step-7.safetensors").tensor("geo.weight"), tensors["geo.weight"])
    assert verify_checkpoint(outcome.path) == []
    size = sum(file.stat().st_size for file in [*outcome.path.iterdir(), tmp_path / "step-7.safetensors"])
    assert outcome.bytes_written == size - (outcome.path / "manifest.json").stat().st_size
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "checkpoints", "manifest.json", "rank-00000.json", "rank-00000.safetensors", "step-7", "step-7.safetensors"
    ]  # fmt: skip


def test_the_data_file_is_a_safetensors_file(tmp_path):
    state = values(SHAPES, 1)
    saved(tmp_path, 3, state)
    reader = open_checkpoint(tmp_path / "checkpoints" / "step-3" / "rank-00000.safetensors")
    for row, part in enumerate(("master", "exp_avg", "exp_avg_sq")):
        assert torch.equal(reader.tensor(part), torch.cat([state[name][row] for name in SHAPES]))


def test_no_checkpoint_yet(tmp_path):
    for which in ("latest", "auto"):
        assert load(tmp_path, which, flat_fragments(SHAPES, blank(SHAPES), 0, 1), alone()) is None
    with pytest.raises(CheckpointError, match=r"step-4 does not exist; there are the steps 0 \(\)"):
        load(tmp_path, 4, flat_fragments(SHAPES, blank(SHAPES), 0, 1), alone())


@pytest.mark.parametrize(
    ("before", "after"),
    itertools.product([(2, flat_fragments), (4, flat_fragments), (3, row_fragments), (12, row_fragments)], repeat=2),
    ids=lambda way: f"{way[0]}{way[1].__name__[:4]}",
)
def test_every_split_is_loaded_into_every_other(tmp_path, before, after):
    state = values(SHAPES, 2)
    saved(tmp_path, 5, state, *before)
    whole, states = loaded(tmp_path, *after)
    assert same(whole, state)
    for rank, (step, world_size, rng) in enumerate(states):
        assert (step, world_size) == (5, before[0])
        assert rng == ({"torch": f"rank {rank}"} if before[0] == after[0] else None)


def test_another_network_is_refused_and_nothing_is_touched(tmp_path):
    state = values(SHAPES, 1)
    for step in (1, 2):
        saved(tmp_path, step, state)
    other = {"geo.weight": (5, 8), "geo.bias": (7,), "token": (1, 3), "new": (2,)}
    for which in ("latest", "auto", 1):  # `auto` is for damage: an older checkpoint would not fit either
        fragments = flat_fragments(other, values(other, 3), 0, 1)
        with pytest.raises(CheckpointError, match="does not belong to this network") as error:
            load(tmp_path, which, fragments, alone())
        for said in ("missing in the checkpoint: 1 (new)", "unknown to the network: 1 (gate)",
                     "of another shape: 1 (geo.weight [8, 5], expected [5, 8])"):  # fmt: skip
            assert said in str(error.value)
        assert same(gathered([fragments]), values(other, 3))


def test_ranks_that_hold_too_little_or_the_same_twice(tmp_path):
    saved(tmp_path, 1, values(SHAPES, 1))
    with pytest.raises(
        CheckpointError, match=r"do not make up the parameters: 1 \(geo.weight: elements 26 to 40 are missing"
    ):
        load(tmp_path, "latest", flat_fragments(SHAPES, blank(SHAPES), 0, 2), alone())
    twice = flat_fragments(SHAPES, blank(SHAPES), 0, 1)
    with pytest.raises(CheckpointError, match=r"geo.weight: element 0 is held twice"):
        load(tmp_path, "latest", [*twice, twice[0]], alone())


def test_a_look_at_what_would_be_loaded(tmp_path):
    assert peek(tmp_path, "latest") is None
    for step in (1, 2):
        saved(tmp_path, step, values(SHAPES, 1))
    assert peek(tmp_path, "latest").step == 2
    assert peek(tmp_path, 1).manifest.state["config"] == run_state(1).config
    (tmp_path / "checkpoints" / "step-2" / "manifest.json").unlink()
    assert peek(tmp_path, "auto").step == 1
    with pytest.raises(CheckpointError, match="step-2/manifest.json is missing"):
        peek(tmp_path, "latest")
