"""What is at a path is told as it is: figures, hashes, damage, and which checkpoint of a run is the newest good one."""

import hashlib
import json
import shutil

import pytest
import torch
from checkpoint_samples import flat_fragments, run_state, stage_info, values
from forked_ranks import alone
from safetensors.torch import save_file
from trained_stages import ENCODINGS, random_base, tiny_wan_of, trained

from fw_train.checkpoint.saver import CheckpointSaver, SaveParams, StageWeights
from fw_train.cli import main
from fw_train.data.sidecar_files import fingerprint
from fw_train.inspection import inspect_path, module_of
from fw_train.run.folder import Status, write_status
from fw_train.weights.base_hash import base_hash

SHAPES = {"geo.weight": (8, 5), "geo.bias": (7,)}
CONFIG = {"train": {"stage": "stage1"}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    for step in (4, 10):
        saver = CheckpointSaver(output, alone(), SaveParams())
        state = values(SHAPES, step)
        weights = StageWeights({"geo.weight": state["geo.weight"][0].bfloat16()}, stage_info(step))
        saver.save(step, flat_fragments(SHAPES, state, 0, 1), run_state(step, config=CONFIG), weights)
        assert saver.wait().path
    write_status(output, None, Status("stopped", 10, "told to"))
    return output


@pytest.fixture
def output(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "output")
    return tmp_path / "output"


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def told(capsys, *words):
    """Exit code, standard output, standard error."""
    code = main(["inspect", *map(str, words)])
    return code, *capsys.readouterr()


def test_weights_of_a_stage(tmp_path, capsys):
    path = trained(tmp_path / "one", "stage1", precision="bf16")
    code, out, _ = told(capsys, path)
    assert code == 0
    assert f"{path}: trained weights of stage1, step 3" in out
    assert hashlib.sha256(path.read_bytes()).hexdigest() in out
    assert "fresh weights of seed 0" in out
    assert f"  text          {fingerprint(ENCODINGS['text'])[:16]}  encoder: 'hash:8', version: 2" in out
    assert f"  latent        {fingerprint(ENCODINGS['latent'])[:16]}  codec: 'dct', version: 1" in out
    assert '{"' not in out
    assert json.loads(told(capsys, path, "--json")[1])[0]["encodings"] == ENCODINGS
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["token_camera"])
    assert row[1:] == ["1", "24", "48", "bfloat16"]
    total = next(line.split() for line in out.splitlines() if line.split()[:1] == ["total"])
    found = inspect_path(path)
    assert total[1:] == [str(len(found.keys)), f"{sum(i.shape.numel() for i in shapes(found)):,}", total[3]]
    assert total[3] == f"{2 * int(total[2].replace(',', '')):,}"
    assert "geo_blocks.0.self_attn.q.weight" not in out
    assert "geo_blocks.0.self_attn.q.weight  " in told(capsys, path, "--keys")[1]


def shapes(found):
    return [info._replace(shape=torch.Size(info.shape)) for info in found.keys.values()]


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_folder_with_a_wan_transformer(tmp_path, capsys, layout):
    wan = tiny_wan_of(tmp_path)
    path = tmp_path / "wan" / ("transformer" if layout == "diffusers" else "") / "diffusion_pytorch_model.safetensors"
    random_base(path, wan, layout=layout)
    code, out, _ = told(capsys, tmp_path / "wan")
    assert code == 0
    assert f"{path}: Wan transformer, {layout} names" in out
    assert base_hash(path, cached=False) in out
    code, out, _ = told(capsys, tmp_path / "wan", "--no-hash")
    assert base_hash(path, cached=False) not in out
    assert "not taken" in out


def test_modules_are_counted_with_their_like(tmp_path):
    assert [module_of(key) for key in (
        "blocks.11.self_attn.q.weight", "token_camera", "geometry.geo_blocks.0.gate", "geometry.pose_enc.0.weight",
        "condition_embedder.time_proj.bias", "head.head.weight", "time_embedding.0.bias",
    )] == [
        "blocks.*", "token_camera", "geometry.geo_blocks.*", "geometry.pose_enc.*",
        "condition_embedder.time_proj", "head", "time_embedding.*",
    ]  # fmt: skip


def test_json_says_the_same(tmp_path, capsys, output):
    path = tmp_path / "x.safetensors"
    save_file({"a.w": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, path, {"note": "mine"})
    code, out, _ = told(capsys, path, output, "--json")
    weights, run = json.loads(out)
    assert code == 0
    assert weights["metadata"] == {"note": "mine"}
    assert [(m["module"], m["parameters"], m["bytes"]) for m in weights["modules"]] == [("a", 6, 24), ("b", 4, 4)]
    assert "keys" not in weights
    assert (weights["parameters"], weights["kind"], weights["base_hash"]) == (10, "weights", None)
    assert [saved["step"] for saved in run["checkpoints"]] == [10, 4]
    assert run["newest_good"].endswith("step-10")
    keys = json.loads(told(capsys, path, "--json", "--keys")[1])[0]["keys"]
    assert keys["b"] == {"shape": [4], "dtype": "int8"}


def test_a_whole_checkpoint(output, capsys):
    code, out, err = told(capsys, output / "checkpoints" / "step-10")
    assert (code, err) == (0, "")
    assert "step-10: whole" in out
    for fact in ("stage1", "1 ranks", "64", "ba5e" * 16, "step-10.safetensors"):
        assert fact in out


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "manifest.json"])
def test_damage_is_named_and_the_exit_code_is_1(output, capsys, name):
    flip(output / "checkpoints" / "step-10" / name)
    code, out, _ = told(capsys, output / "checkpoints" / "step-10")
    assert code == 1
    assert "DAMAGED" in out
    assert name in out.partition("DAMAGED")[2].partition("damage  ")[2]


def test_a_missing_file_is_damage(output, capsys):
    (output / "checkpoints" / "step-10" / "rank-00000.json").unlink()
    code, out, _ = told(capsys, output / "checkpoints" / "step-10")
    assert code == 1
    assert "rank-00000.json is missing" in out
    (output / "checkpoints" / "step-10" / "manifest.json").unlink()
    code, out, _ = told(capsys, output / "checkpoints" / "step-10")
    assert code == 1
    assert "manifest.json is missing" in out


def test_a_run_names_its_newest_good_checkpoint(output, capsys):
    code, out, _ = told(capsys, output)
    assert code == 0
    assert out.splitlines()[0] == f"{output}: run, stopped, step 10: told to"
    assert f"newest good checkpoint: {output}/checkpoints/step-10" in out
    assert "trained weights: step-4.safetensors, step-10.safetensors" in out
    flip(output / "checkpoints" / "step-10" / "rank-00000.safetensors")
    code, out, _ = told(capsys, output)
    assert code == 1
    assert "rank-00000.safetensors" in out
    assert f"newest good checkpoint: {output}/checkpoints/step-4" in out
    shutil.rmtree(output / "checkpoints" / "step-4")
    assert "newest good checkpoint: none" in told(capsys, output)[1]


def test_weights_that_were_not_committed_with_it_are_damage(output, capsys):
    flip(output / "step-10.safetensors")
    code, out, _ = told(capsys, output)
    assert code == 1
    assert "step-10.safetensors is not what was committed" in out


def test_what_cannot_be_read_does_not_hide_the_rest(tmp_path, capsys):
    path = trained(tmp_path / "one", "stage1")
    code, out, err = told(capsys, tmp_path / "none", path)
    assert code == 1
    assert "there is no such file" in err
    assert "trained weights of stage1" in out
    assert json.loads(told(capsys, tmp_path / "none", path, "--json")[1])[0]["error"]
