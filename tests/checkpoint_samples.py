"""Parameters split over ranks by hand, as ZeRO (one flat run per rank) and as FSDP2 (rows of each parameter)."""

import math

import torch

from fw_train.checkpoint.run_state import RunState
from fw_train.engine.base import Fragment
from fw_train.weights.stage import StageInfo

SHAPES = {"geo.weight": (8, 5), "geo.bias": (7,), "token": (1, 3), "gate": ()}


def values(shapes, seed):
    """name -> [3, elements]: master, exp_avg, exp_avg_sq."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, math.prod(shape), generator=generator) for name, shape in shapes.items()}


def flat_fragments(shapes, state, rank, size, padding=0):
    """The parameters one after the other in one buffer, padded, of which each rank owns an equal run."""
    total = sum(math.prod(shape) for shape in shapes.values()) + padding
    share = math.ceil(total / size)
    low, high = rank * share, (rank + 1) * share
    fragments, offset = [], 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        begin, end = max(low, offset), min(high, offset + numel)
        if begin < end:
            fragments.append(_fragment(name, shape, state, begin - offset, end - begin))
        offset += numel
    return fragments


def row_fragments(shapes, state, rank, size):
    """Each parameter by its rows; a rank may have none of them, and says so with an empty fragment."""
    fragments = []
    for name, shape in shapes.items():
        rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        share = math.ceil(rows / size)
        begin, end = min(rows, rank * share), min(rows, (rank + 1) * share)
        fragments.append(_fragment(name, shape, state, begin * width, (end - begin) * width))
    return fragments


def _fragment(name, shape, state, start, numel):
    master, *moments = (row[start : start + numel].clone() for row in state[name])
    return Fragment(name, shape, start, numel, torch.nn.Parameter(master), *moments)


def blank(shapes):
    return {name: torch.full((3, math.prod(shape)), torch.nan) for name, shape in shapes.items()}


def gathered(parts):
    """name -> [3, elements] of the fragments of all ranks; every element is there once."""
    shapes = {fragment.name: fragment.shape for part in parts for fragment in part}
    whole = blank(shapes)
    for part in parts:
        for fragment in part:
            rows = torch.stack((fragment.master.detach(), fragment.exp_avg, fragment.exp_avg_sq))
            whole[fragment.name][:, fragment.start : fragment.start + fragment.numel] = rows
    return whole


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_state(step, world_size=1, **changes):
    fields = {
        "step": step,
        "segments": ((0, 64),),
        "optimiser_steps": step - 1,
        "config": {"train": {"learning_rate": 1e-5, "steps": 20_000}},
        "base_hash": "ba5e" * 16,
        "data_fingerprint": "da7a",
        "guard": {"window": [0.1, 0.25]},
        "code_version": "v0-1-gabc",
        "world_size": world_size,
        "rng": {"torch": "AAAA"},
    }
    return RunState(**{**fields, **changes})


def stage_info(step):
    return StageInfo("stage1", step, "c0ff", "ba5e" * 16, torch.bfloat16)
