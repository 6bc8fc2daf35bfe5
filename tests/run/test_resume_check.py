"""Which changes of a configuration a run may go on with; every field of the configuration is tried."""

import copy

import pytest

from fw_train.config import Config, to_tree
from fw_train.run.allowed_changes import HARMLESS, ROUNDING, compare_configs, flattened

TREE = to_tree(Config())
FREE = {"train.steps"}  # under the constant schedule


def changed(**changes):
    tree = copy.deepcopy(TREE)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        tree[section][key] = value
    return tree


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, {"path": "/data/x", "weight": 1.0, "name": ""}]
    return 1.0


def test_the_same_configuration_goes_on():
    assert compare_configs(TREE, TREE) == []


@pytest.mark.parametrize("name", flattened(TREE))
def test_every_field_is_free_by_the_table_or_refused_by_name(name):
    section, key = name.split(".")
    new = changed(**{f"{section}__{key}": other(TREE[section][key])})
    problems = compare_configs(TREE, new)
    if {name, f"{section}.*"} & (HARMLESS.keys() | ROUNDING.keys() | FREE):
        assert problems == []
    else:
        assert len(problems) == 1
        assert problems[0].startswith(f"{name}: ")
        assert f"--allow-change {name} " in problems[0]
        assert compare_configs(TREE, new, {name}) == []


def test_the_table_names_only_fields_that_exist():
    known = flattened(TREE).keys() | {f"{section}.*" for section in TREE}
    assert (HARMLESS.keys() | ROUNDING.keys()) - known == set()
    assert not HARMLESS.keys() & ROUNDING.keys()


def test_what_decides_the_numbers_is_in_no_table():
    refused = {
        "train.learning_rate", "train.seed", "train.global_batch", "train.precision", "train.stage", "train.warmup_steps",
        "flow.shift", "loss.preset", "data.frames", "data.sizes_px", "data.flip", "guard.spike_deviations", "model.dim",
    }  # fmt: skip
    assert refused <= flattened(TREE).keys()
    assert all(
        compare_configs(TREE, changed(**{n.replace(".", "__"): other(flattened(TREE)[n])}), set()) for n in refused
    )


def test_the_number_of_steps_matters_to_a_schedule_that_ends():
    cosine = changed(train__schedule="cosine")
    longer = copy.deepcopy(cosine)
    longer["train"]["steps"] += 1
    assert compare_configs(TREE, changed(train__steps=30_000)) == []
    assert len(compare_configs(cosine, longer)) == 1
    assert len(compare_configs(TREE, longer)) == 2, "the schedule and the steps"


def test_allowing_one_field_does_not_allow_another():
    problems = compare_configs(TREE, changed(train__seed=1, train__learning_rate=1.0), {"train.seed"})
    assert [problem.partition(":")[0] for problem in problems] == ["train.learning_rate"]


def test_a_name_that_is_no_field_is_a_mistake():
    assert compare_configs(TREE, TREE, {"train.sed"}) == [
        "--allow-change train.sed: there is no such field; did you mean train.seed?"
    ]


def test_a_dataset_may_move_but_not_change_its_name_or_weight():
    def with_sources(*sources):
        return changed(data__sources=[dict(zip(("path", "weight", "name"), source, strict=True)) for source in sources])

    old = with_sources(("/a/indoor", 1.0, ""), ("/a/outdoor", 2.0, "out"))
    assert compare_configs(old, with_sources(("/b/indoor", 1.0, ""), ("/b/elsewhere", 2.0, "out"))) == []
    for moved in [("/b/inside", 1.0, ""), ("/a/indoor", 3.0, ""), ("/a/indoor", 1.0, "in")]:
        assert len(compare_configs(old, with_sources(moved, ("/a/outdoor", 2.0, "out")))) == 1
    assert len(compare_configs(old, with_sources(("/a/indoor", 1.0, "")))) == 1


def test_a_checkpoint_of_an_older_version():
    """A field added since then had its default; one taken away cannot be honoured."""
    old = copy.deepcopy(TREE)
    del old["train"]["gate_lr_scale"], old["guard"]
    assert compare_configs(old, TREE) == []
    assert len(compare_configs(old, changed(train__gate_lr_scale=10.0))) == 1
    older = copy.deepcopy(TREE)
    older["train"]["dropout"] = 0.5
    assert "unknown to this version" in compare_configs(older, TREE)[0]


def test_a_number_and_its_text_are_not_the_same():
    assert len(compare_configs(TREE, changed(train__seed=False))) == 1
