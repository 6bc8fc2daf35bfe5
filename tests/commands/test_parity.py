"""`fw parity` on the reference activations, and on ones that were tampered with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fw_train.cli import main

FIXTURES = sorted(Path("tests/fixtures").glob("*.safetensors"))


def read(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def tampered(tmp_path):
    """The small text-to-video fixture, changed."""

    def write(change=lambda tensors: None, config=None):
        tensors, metadata = read("tests/fixtures/wan_dit_t2v.safetensors")
        change(tensors)
        if config is not None:
            metadata = {"config": json.dumps(json.loads(metadata["config"]) | config)}
        path = tmp_path / "fixture.safetensors"
        save_file(tensors, path, metadata)
        return str(path)

    return write


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_the_network_reproduces_the_reference(path, capsys):
    assert main(["parity", str(path)]) == 0
    assert "all equal" in capsys.readouterr().out


def test_all_fixtures_are_there():
    assert {path.stem for path in FIXTURES} == {"bicross", "wan_dit_camera", "wan_dit_i2v", "wan_dit_t2v"}


def test_a_tighter_tolerance_than_fp32_holds_fails():
    assert main(["parity", "tests/fixtures/wan_dit_t2v.safetensors", "--tolerance", "1e-9"]) == 1


@pytest.mark.parametrize("name", ["out.velocity", "out.block_1", "state.blocks.1.ffn.0.weight", "in.text"])
def test_a_changed_number_is_found(tampered, capsys, name):
    def change(tensors):
        tensors[name] = tensors[name] * 1.01 + 0.01

    assert main(["parity", tampered(change)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_nan_fails(tampered):
    def change(tensors):
        tensors["out.velocity"][0, 0, 0, 0, 0] = torch.nan

    assert main(["parity", tampered(change)]) == 1


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.pop("state.head.head.bias"), None, "Missing key"),
        (lambda t: t.update({"in.extra": torch.zeros(1)}), None, "unknown inputs in.extra"),
        (lambda t: t.update({"strange": torch.zeros(1)}), None, "`strange` is none of"),
        (lambda t: t.update({"out.depth": torch.zeros(1)}), None, "no module gives out.depth"),
        (lambda t: t.pop("in.text"), None, "lacks in.text"),
        (lambda t: None, {"in_dim": 36}, "has 16 input channels, the fixture 36"),
        (lambda t: None, {"variant": "v2v"}, "no Wan variant `v2v`"),
        (lambda t: None, {"dim": 64}, "do not fit"),
    ],
)
def test_a_fixture_that_cannot_be_used_is_one_clear_error(tampered, capsys, change, config, message):
    assert main(["parity", tampered(change, config)]) == 1
    assert message in capsys.readouterr().err


def test_a_cut_fixture_is_one_clear_error(tmp_path, capsys):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path("tests/fixtures/wan_dit_t2v.safetensors").read_bytes()[:10_000])
    assert main(["parity", str(cut)]) == 1
    assert "not a readable safetensors file" in capsys.readouterr().err
    assert main(["parity", str(tmp_path / "none.safetensors")]) == 1
    assert "no fixture" in capsys.readouterr().err
