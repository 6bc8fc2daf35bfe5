"""docs/configuration.md is what the dataclasses say, field by field."""

import dataclasses
from pathlib import Path

import pytest

from fw_train.cli import main
from fw_train.config import Config, SourceConfig, load_config, to_tree
from fw_train.config_reference import reference, sections


def test_the_page_is_current():
    page = Path("docs/configuration.md").read_text()
    assert page == reference(), "write it anew: fw config --reference > docs/configuration.md"


def test_every_field_is_there_with_its_default_and_its_meaning():
    rows = {field.name: field for section in sections() for field in section.fields}
    tree = to_tree(Config())
    expected = {f"{name}.{field}" for name, section in tree.items() for field in section}
    assert rows.keys() == expected | {field.name for field in dataclasses.fields(SourceConfig)}
    assert [row.name for row in rows.values() if not row.meaning] == []
    assert rows["train.learning_rate"].default == "`1e-05`"
    assert rows["data.sizes_px"][1:3] == ("list of 2 whole numbers", "`[[336, 592]]`")
    assert rows["loss.depth_weight"][1:3] == ("number or `null`", "`null`")
    assert rows["engine.kind"].kind == "`deepspeed`, `fsdp2`"
    assert rows["weights.base"].meaning.startswith("Wan checkpoint: file, folder or index")
    assert rows["path"].default == "must be given"
    assert rows["weight"].default == "`1.0`"


def test_every_section_says_what_it_is():
    assert [section.name for section in sections() if not section.meaning] == []


def test_the_resolved_configuration_reads_back_as_the_same(tmp_path, capsys):
    assert main(["config", "configs/stage1.yaml", "train.micro_batch=2", "data.frames=41"]) == 0
    path = tmp_path / "resolved.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == load_config("configs/stage1.yaml", ["train.micro_batch=2", "data.frames=41"])


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "give a configuration"), (("configs/stage1.yaml", "data.frames=40"), "data.frames=40 is not 4k + 1")],
)
def test_what_is_wrong_is_said(words, message, capsys):
    assert main(["config", *words]) == 1
    assert message in capsys.readouterr().err
