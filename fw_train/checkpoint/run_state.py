"""What a resume needs beside weights and moments: counters, order, configuration, random state; all of it JSON.

Random generators are put back only on the same number of ranks. Samples and their noise never depend on them (they are
functions of seed and position); what is left, such as a dropout inside a foreign model, follows the rank.
"""

import base64
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RunState:
    step: int  # optimiser steps done, skipped ones included
    segments: tuple[tuple[int, int], ...]  # (first_step, global_batch): all that the sample order needs
    optimiser_steps: int  # applied steps, as Adam counts them
    config: dict[str, Any]  # as `config.to_tree` gives it
    base_hash: str
    data_fingerprint: str
    data_facts: dict[str, Any] = field(default_factory=dict)
    scaler_state: dict[str, float] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    code_version: str = ""
    world_size: int = 1
    rng: dict[str, Any] | None = None  # of this rank; after loading None where the number of ranks has changed


def seed_rng(seed: int, rank: int) -> None:
    """Starts every generator of this process from the run's seed, each rank apart."""
    own = seed * 1_000_003 + rank
    random.seed(own)
    np.random.seed(own % 2**32)  # noqa: NPY002
    torch.manual_seed(own)


def capture_rng() -> dict[str, Any]:
    """The generators of this process: Python's, NumPy's, torch's on the CPU and on every visible GPU."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - libraries draw from the global generator
    assert isinstance(numpy_state, dict)
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": _text(np.ascontiguousarray(numpy_state["state"]["key"], "<u4").tobytes()),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
        "cuda": [_text(state.numpy().tobytes()) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Continues the generators where `capture_rng` saw them; GPUs only where there are as many as then."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": "MT19937",
            "state": {"key": np.frombuffer(base64.b64decode(saved["key"]), "<u4"), "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(_tensor(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_tensor(text) for text in state["cuda"]])


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
