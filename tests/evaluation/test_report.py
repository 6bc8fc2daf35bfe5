"""The table and the document of an evaluation."""

import json
import math

from fw_train.evaluation.metrics import GEOMETRY
from fw_train.evaluation.report import Evaluation, Judged, best_of, document, table

ABSREL, DELTA = (
    next(metric for metric in GEOMETRY if metric.name == name) for name in ("depth/absrel", "depth/delta1")
)


def judged(name, **metrics):
    return Judged(
        name, f"/runs/{name}.safetensors", "stage1", 3, {key.replace("__", "/"): v for key, v in metrics.items()}
    )


def evaluation(*checkpoints, constant=None):
    return Evaluation("data/held_out", 24, 0.1, 0, list(checkpoints), constant or {}, ["pictures/depth_00.png"])


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()[1:]}


def test_each_metric_has_a_row_and_each_checkpoint_a_column():
    first = judged("run/step-0", depth__delta1=0.25, depth__absrel=0.5)
    last = judged("run/step-9", depth__absrel=0.125, depth__delta1=0.75)
    text = table(evaluation(first, last, constant={"depth/absrel": 0.1, "loss/depth": 2.0}))
    assert text.splitlines()[0].split() == ["better", "run/step-0", "run/step-9", "constant"]
    assert rows(text) == {
        "depth/absrel": ["lower", "0.5000", "0.1250*", "0.1000"],  # stars are for networks
        "depth/delta1": ["higher", "0.2500", "0.7500*", "-"],
        "loss/depth": ["lower", "-", "-", "2.0000"],
    }
    assert "*" not in table(evaluation(first))


def test_cases_follow_one_another():
    one = judged("a", **{"depth__absrel": 0.1, "depth__absrel_s0.5": 0.2, "depth__absrel_aligned": 0.3,
                         "depth__absrel_aligned_s0.5": 0.4, "diffusion__mean": 1.0})  # fmt: skip
    assert [line.split()[0] for line in table(evaluation(one)).splitlines()[1:]] == [
        "depth/absrel", "depth/absrel_aligned", "diffusion/mean", "depth/absrel_s0.5", "depth/absrel_aligned_s0.5",
    ]  # fmt: skip


def test_the_best_is_a_number():
    assert best_of([None, math.nan, 0.5, 0.2], ABSREL) == 3
    assert best_of([None, math.nan, 0.5, 0.2], DELTA) == 2
    assert best_of([None, math.nan], DELTA) is None


def test_the_document_says_which_way_is_better():
    tree = json.loads(json.dumps(document(evaluation(judged("a", depth__absrel=0.5), constant={"depth/absrel": 0.6}))))
    assert tree["checkpoints"] == [
        {"name": "a", "path": "/runs/a.safetensors", "stage": "stage1", "step": 3, "metrics": {"depth/absrel": 0.5}}
    ]
    assert (tree["data"], tree["clips"], tree["level"], tree["constant"]) == (
        "data/held_out", 24, 0.1, {"depth/absrel": 0.6},
    )  # fmt: skip
    assert tree["better"]["depth/delta1"] == "higher"
    assert tree["pictures"] == ["pictures/depth_00.png"]
