import json
import random

import numpy as np
import torch
from checkpoint_samples import run_state

from fw_train.checkpoint.layout import Manifest, state_tree
from fw_train.checkpoint.run_state import capture_rng, restore_rng


def draws():
    return [
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),  # noqa: NPY002
        torch.rand(3).tolist(), torch.randn(1).item(),
    ]  # fmt: skip


def test_all_generators_go_on_where_they_were():
    random.gauss(0, 1), np.random.randn()  # noqa: NPY002 - both keep a second value back
    state = json.loads(json.dumps(capture_rng()))
    first = draws()
    assert draws() != first
    restore_rng(state)
    assert draws() == first
    restore_rng(state)
    assert draws() == first, "and again"


def test_the_state_survives_json():
    state = run_state(7, rng={"torch": "AA"}, segments=((0, 64), (5, 128)), scaler_state={"scale": 2.0**16})
    tree = json.loads(json.dumps(state_tree(state)))
    assert Manifest(7, 1, (), None, tree).run_state({"torch": "AA"}) == state
