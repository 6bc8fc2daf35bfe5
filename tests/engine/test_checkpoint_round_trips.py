"""Checkpoints on disk between worlds and engines: the same bits come back, and the same world goes on as if never stopped."""

import math
from pathlib import Path

import pytest
import torch

from fw_train import dist
from fw_train.checkpoint.fragments import PARTS, read_index
from fw_train.checkpoint.layout import list_checkpoints
from fw_train.checkpoint.loading import load, verify_checkpoint
from fw_train.checkpoint.run_state import RunState, capture_rng, restore_rng
from fw_train.checkpoint.saver import CheckpointSaver, SaveParams, StageWeights
from fw_train.engine.base import Fragment
from fw_train.weights.stage import StageInfo
from processes import run_function
from runs import Run

ENGINES = {"zero2": {"kind": "deepspeed", "zero_stage": 2}, "fsdp2": {"kind": "fsdp2"}}


def hops(plan):
    """Each entry of `plan`, (engine, folder to load or "", steps to train, folder to save), in one world; the losses."""
    world = dist.start(120)
    losses = []
    for engine, source, steps, target in plan:
        run = Run(world, stage="stage1", precision="bf16", **ENGINES[engine])
        done = 0
        if source:
            state = load(Path(source), "latest", run.engine.fragments(), world)
            run.engine.restore(state.optimiser_steps, state.scaler_state)
            done = state.step
            if state.rng is not None:
                restore_rng(state.rng)
        losses.append([loss.hex() for loss in run.train(steps, first=done)[0]])
        save(Path(target), world, run, done + steps)
    return losses


def save(output, world, run, step):
    saver = CheckpointSaver(output, world, SaveParams())
    state = RunState(
        step=step,
        segments=((0, world.size),),
        optimiser_steps=run.engine.optimiser_steps(),
        config={},
        base_hash="ba5e",
        data_fingerprint="da7a",
        scaler_state=run.engine.scaler_state(),
        world_size=world.size,
        rng=capture_rng(),
    )
    weights = StageWeights(run.engine.trainable_weights(), StageInfo("stage1", step, "c0ff", "ba5e", torch.bfloat16))
    assert saver.save(step, run.engine.fragments(), state, weights if world.rank == 0 else None).started
    assert saver.wait().error == ""


def content(output):
    """Masters and moments by parameter, and the optimiser's count, as one process reads them."""
    [checkpoint] = list_checkpoints(output / "checkpoints")
    assert verify_checkpoint(checkpoint.path) == []
    ranks = checkpoint.manifest.state["world_size"]
    shapes = {piece.name: piece.shape for rank in range(ranks) for piece in read_index(checkpoint, rank).pieces}
    whole = [
        Fragment(name, shape, 0, math.prod(shape), *(torch.full((math.prod(shape),), math.nan) for _ in PARTS))
        for name, shape in shapes.items()
    ]
    state = load(output, "latest", whole, dist.World(0, 1, 0, 1, torch.device("cpu")))
    return {(f.name, part): getattr(f, part) for f in whole for part in PARTS}, state.optimiser_steps


@pytest.mark.slow
def test_round_trips_and_twins(tmp_path):
    places = {name: str(tmp_path / name) for name in ("a", "b", "c", "four", "back", "end", "twin", "again")}
    first = run_function(
        hops,
        [
            ["zero2", "", 2, places["a"]],
            ["fsdp2", places["a"], 0, places["b"]],
            ["zero2", places["b"], 0, places["c"]],
            ["zero2", "", 4, places["end"]],
        ],
        size=2,
        timeout_s=240,
    )
    run_function(hops, [["zero2", places["a"], 0, places["four"]]], size=4, timeout_s=240)
    second = run_function(
        hops,
        [
            ["zero2", places["four"], 0, places["back"]],
            ["zero2", places["a"], 1, places["twin"]],
            ["zero2", places["twin"], 1, places["again"]],
        ],
        size=2,
        timeout_s=240,
    )
    saved, steps = content(tmp_path / "a")
    assert steps == 2
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert any(tensor.abs().max() > 0 for (_, part), tensor in saved.items() if part == "exp_avg_sq")
    for name in ("b", "c", "four", "back"):
        other, steps = content(tmp_path / name)
        assert steps == 2
        assert other.keys() == saved.keys()
        assert [key for key in saved if not torch.equal(saved[key], other[key])] == [], name
    weights = (tmp_path / "a" / "step-2.safetensors").read_bytes()
    assert (tmp_path / "back" / "step-2.safetensors").read_bytes() == weights
    assert (tmp_path / "c" / "step-2.safetensors").read_bytes() == weights

    end, steps = content(tmp_path / "end")
    twin, twin_steps = content(tmp_path / "again")
    assert steps == twin_steps == 4
    assert [key for key in end if not torch.equal(end[key], twin[key])] == [], "two resumes in a row change no bit"
    assert second[0][1] + second[0][2] == first[0][3][2:], "nor any loss"
