"""The base hash: what changes it, what does not, and a cache that can only save time."""

import hashlib
import json
import logging
import os

import pytest
import torch
from safetensors.torch import save_file

from fw_train.model.wan import WanDiT
from fw_train.weights import base_hash as module
from fw_train.weights.base_hash import base_hash, cache_path
from fw_train.weights.files import CheckpointError, open_checkpoint
from fw_train.weights.wan import to_diffusers
from samples import tiny_wan


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fw_train" / "base_hash.json"


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {name: torch.randn(p.shape).bfloat16() for name, p in WanDiT(tiny_wan(layers=1)).named_parameters()}


def saved(path, state):
    path.parent.mkdir(exist_ok=True)
    save_file(state, path)
    return path


def test_a_golden_hash(tmp_path):
    state = {
        "head.modulation": torch.tensor([[1.0, -2.0]]),
        "blocks.0.norm3.bias": torch.tensor([0.5, 3.0], dtype=torch.bfloat16),
        "b": torch.tensor(7),
        "a": torch.zeros(0),
    }
    text = (
        b'["a", "float32", [0]]\n'
        b'["b", "int64", []]\n' + (7).to_bytes(8, "little") + b'["blocks.0.norm3.bias", "bfloat16", [2]]\n'
        b"\x00\x3f\x40\x40"
        b'["head.modulation", "float32", [1, 2]]\n'
        b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    )
    assert base_hash(saved(tmp_path / "x.safetensors", state)) == hashlib.sha256(text).hexdigest()


def test_the_same_weights_have_one_hash_in_whatever_form(tmp_path, state):
    expected = base_hash(saved(tmp_path / "x.safetensors", state))
    diffusers = {to_diffusers(name): tensor for name, tensor in state.items()}
    renamed = {f"model.diffusion_model.{name}": tensor for name, tensor in reversed(state.items())}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    placed = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(diffusers)}
    for shard in set(placed.values()):
        saved(tmp_path / "shards" / shard, {key: diffusers[key] for key in placed if placed[key] == shard})
    (tmp_path / "shards" / "x.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))

    forms = (
        saved(tmp_path / "diffusers.safetensors", diffusers),
        saved(tmp_path / "prefixed.safetensors", renamed),
        tmp_path / "x.pth",
        tmp_path / "shards",
        open_checkpoint(tmp_path / "shards"),
    )
    assert [base_hash(form) for form in forms] == [expected] * len(forms)


def test_any_other_weights_have_another_hash(tmp_path, state):
    name, other = "blocks.0.ffn.0.weight", "blocks.0.ffn.2.weight"
    bit = state[name].clone()
    bit.view(torch.uint8)[3, 5] ^= 1
    changed = {
        "original": state,
        "one bit": {**state, name: bit},
        "dtype": {**state, name: state[name].view(torch.float16)},
        "shape": {**state, name: state[name].reshape(-1)},
        "names swapped": {**state, name: state[other], other: state[name]},
        "one less": {key: tensor for key, tensor in state.items() if key != name},
        "one more": {**state, "ref_conv.bias": torch.zeros(0)},
    }
    hashes = {base_hash(saved(tmp_path / f"{what}.safetensors", tensors)) for what, tensors in changed.items()}
    assert len(hashes) == len(changed)


def count_digests(monkeypatch):
    calls = []
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda reader: calls.append(reader.path) or digest(reader))
    return calls


def test_the_cache_is_used_until_a_file_changes(tmp_path, state, own_cache, monkeypatch):
    path = saved(tmp_path / "x.safetensors", state)
    calls = count_digests(monkeypatch)
    first = base_hash(path)
    (tmp_path / "link.safetensors").symlink_to(path)
    assert base_hash(path) == base_hash(tmp_path / "link.safetensors") == first
    assert len(calls) == 1
    assert own_cache == cache_path()
    assert os.listdir(own_cache.parent) == ["base_hash.json"], "nothing temporary stays"

    state["head.head.bias"] = state["head.head.bias"] + 1
    saved(path, state)
    second = base_hash(path)
    assert second != first
    assert base_hash(path) == second
    assert len(calls) == 2
    os.utime(path, ns=(1, 1))
    assert base_hash(path) == second
    assert len(calls) == 3, "another time of modification is another file"
    other = base_hash(saved(tmp_path / "y.safetensors", {"a": torch.zeros(1)}))
    assert (base_hash(path), base_hash(tmp_path / "y.safetensors"), len(calls)) == (second, other, 4)


def test_a_change_of_any_shard_counts(tmp_path):
    for name in ("a", "b"):
        saved(tmp_path / "m" / f"{name}.safetensors", {name: torch.zeros(3)})
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (tmp_path / "m" / "m.safetensors.index.json").write_text(json.dumps(index))
    first = base_hash(tmp_path / "m")
    saved(tmp_path / "m" / "b.safetensors", {"b": torch.ones(3)})
    assert base_hash(tmp_path / "m") != first


def test_without_the_cache_nothing_is_read_or_written_there(tmp_path, state, own_cache, monkeypatch):
    path = saved(tmp_path / "x.safetensors", state)
    expected = base_hash(path, cached=False)
    assert not own_cache.exists()
    base_hash(path)
    poisoned = json.loads(own_cache.read_text())
    poisoned["hashes"][str(path)]["sha256"] = "0" * 64
    own_cache.write_text(json.dumps(poisoned))
    assert base_hash(path) == "0" * 64, "this is where the cache is"
    assert base_hash(path, cached=False) == expected


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format": "other", "hashes": {}}',
        b'{"format": "fw_train.weights.base_hash.v1", "hashes": 3}',
    ],
)
def test_a_damaged_cache_is_said_and_made_anew(tmp_path, state, own_cache, content, caplog):
    path = saved(tmp_path / "x.safetensors", state)
    expected = base_hash(path)
    own_cache.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert base_hash(path) == expected
    assert "made anew" in caplog.text
    caplog.clear()
    assert base_hash(path) == expected
    assert not caplog.text


@pytest.mark.parametrize("damage", [{"sha256": "x"}, {"sha256": None}, {"files": []}, None])
def test_a_damaged_entry_is_not_believed(tmp_path, state, own_cache, damage):
    path = saved(tmp_path / "x.safetensors", state)
    expected = base_hash(path)
    cache = json.loads(own_cache.read_text())
    entry = cache["hashes"][str(path)]
    cache["hashes"][str(path)] = damage and {**entry, "sha256": "0" * 64, **damage}
    own_cache.write_text(json.dumps(cache))
    assert base_hash(path) == expected


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path, state, own_cache, caplog):
    path = saved(tmp_path / "x.safetensors", state)
    own_cache.parent.parent.write_text("a file where the folder should be")
    assert base_hash(path) == base_hash(path, cached=False)
    assert "is not kept" in caplog.text


def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_path() == tmp_path / ".cache" / "fw_train" / "base_hash.json"


def test_files_that_cannot_be_read_have_no_hash(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        base_hash(tmp_path / "none.safetensors")
