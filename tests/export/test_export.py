"""Exports hold what was trained, bit for bit, under names that others read, and are complete or not there."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_stages import ENCODINGS, random_base, tiny_wan_of, trained

from fw_train.build import on_meta
from fw_train.cli import main
from fw_train.export.names import exported_names, network_name
from fw_train.export.tensors import ExportedTensor, load_export, plan_export
from fw_train.export.writing import parse_bytes, split, write_export
from fw_train.inference import config_of, load_trained
from fw_train.model.wan import WanDiT
from fw_train.model.world import FantasyWorldModel
from fw_train.weights.base_hash import base_hash
from fw_train.weights.files import CheckpointError, TensorInfo, open_checkpoint
from fw_train.weights.stage import StageInfo, read_stage_info, stored_encodings, write_stage_weights
from fw_train.weights.wan import load_wan
from samples import make_batch, tiny_params

LAYOUTS = ("original", "diffusers")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base of fp32 weights, and what bf16 runs of the three stages leave."""
    folder = tmp_path_factory.mktemp("runs")
    base = folder / "base.safetensors"
    random_base(base, tiny_wan_of(folder))
    one = trained(folder / "one", "stage1", precision="bf16", base=base)
    two = trained(folder / "two", "stage2", precision="bf16", base=base, init_from=one)
    return {"base": base, "stage0": trained(folder / "zero", "stage0"), "stage1": one, "stage2": two}


def export(checkpoint, output, *words):
    assert main(["export", str(checkpoint), "--output", str(output), *words]) == 0
    return output


def video_of(path, config, dtype):
    model = on_meta(lambda: WanDiT(config), dtype)
    load_wan(model, path, "cpu")
    return dict(model.named_parameters())


def answers(model, wan, dtype):
    batch = make_batch(wan, size=2, dtype=dtype)
    with torch.no_grad():
        return model(replace(batch, timestep=torch.tensor([100.0, 700.0])))


# Names.


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_go_out_and_come_back(layout, variant):
    names = [
        name for name, _ in on_meta(lambda: FantasyWorldModel(tiny_params(variant)), torch.float32).named_parameters()
    ]
    exported = exported_names(names, layout)
    assert len(set(exported.values())) == len(names)
    assert [network_name(exported[name], layout) for name in names] == names
    assert exported["token_camera"] == "geometry.token_camera"
    assert exported["video.head.head.bias"] == ("head.head.bias" if layout == "original" else "proj_out.bias")


def test_what_diffusers_has_no_place_for_is_listed():
    names = [
        name for name, _ in on_meta(lambda: FantasyWorldModel(tiny_params("camera")), torch.float32).named_parameters()
    ]
    with pytest.raises(CheckpointError, match=r"no place for 6 \(video\.control_adapter.*--format original"):
        exported_names(names, "diffusers")
    assert exported_names(names, "original")["video.control_adapter.conv.weight"] == "control_adapter.conv.weight"


# Round trips.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", ["stage0", "stage1", "stage2"])
def test_the_importer_reads_the_video_weights_back_bit_for_bit(runs, tmp_path, stage, layout):
    trained_network = load_trained(runs[stage])
    wan, dtype = trained_network.model.params.wan, trained_network.info.dtype
    path = export(runs[stage], tmp_path / "x.safetensors", "--format", layout)
    back = video_of(path, wan, dtype)
    expected = dict(trained_network.model.video.named_parameters())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], expected[name]) for name in expected)
    if stage != "stage0":  # and is the base that the stage may be trained on again, as far as dtypes go
        rounded = tmp_path / "rounded.safetensors"
        save_file({name: t.bfloat16() for name, t in load_file(runs["base"]).items()}, rounded)
        assert base_hash(path) == base_hash(rounded)


@pytest.mark.parametrize("words", [(), ("--format", "diffusers"), ("--max-shard", "30KB")], ids=str)
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_merged_export_is_the_network_that_was_trained(runs, tmp_path, stage, words):
    expected = load_trained(runs[stage])
    folder = export(runs[stage], tmp_path / "out", *words)
    assert len(list(folder.glob("*.safetensors"))) > 1 or "30KB" not in words
    model = load_export(folder)
    wan = model.params.wan
    assert model.params == expected.model.params
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ours, theirs = (answers(m, wan, torch.bfloat16) for m in (model, expected.model))
    for name in ("velocity", "depth", "points", "confidence", "cameras"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).float().std() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trained_weights_alone(runs, tmp_path, layout):
    path = export(runs["stage2"], tmp_path / "x.safetensors", "--trainable", "--format", layout)
    mine, theirs = load_file(path), load_file(runs["stage2"])
    assert mine.keys() == {f"geometry.{name}" for name in theirs}
    assert all(torch.equal(mine[f"geometry.{name}"], theirs[name]) for name in theirs)
    metadata = open_checkpoint(path).metadata
    assert (metadata["stage"], metadata["step"], metadata["contents"]) == ("stage2", "3", "trainable")
    assert metadata["base_hash"] == read_stage_info(runs["stage2"]).base_hash
    assert stored_encodings(open_checkpoint(path)) == ENCODINGS


def test_trained_weights_alone_need_no_configuration(runs, tmp_path):
    (tmp_path / "step-3.safetensors").write_bytes(runs["stage1"].read_bytes())
    export(tmp_path / "step-3.safetensors", tmp_path / "x.safetensors", "--trainable")
    assert main(["export", str(tmp_path / "step-3.safetensors"), "--output", str(tmp_path / "y.safetensors")]) == 1
    assert not (tmp_path / "y.safetensors").exists()


@pytest.fixture
def from_diffusers(monkeypatch):
    """Reads a folder as diffusers does; without accelerate it reads no model that keeps parts in fp32, and here all is fp32."""
    transformer = pytest.importorskip("diffusers").WanTransformer3DModel
    monkeypatch.setattr(transformer, "_keep_in_fp32_modules", None)
    return lambda folder: transformer.from_pretrained(folder).eval()


@pytest.mark.parametrize("stage", ["stage0", "stage1"])
def test_diffusers_builds_the_same_transformer_from_the_folder(runs, tmp_path, from_diffusers, stage):
    folder = export(runs[stage], tmp_path / "out", "--format", "diffusers", "--dtype", "fp32", "--max-shard", "50KB")
    theirs, ours = from_diffusers(folder), load_export(folder).video
    assert theirs.dtype == torch.float32
    batch = make_batch(ours.params, size=2, text_tokens=9)
    with torch.no_grad():
        reference = theirs(batch.latents, batch.timestep, batch.text, return_dict=False)[0]
        velocity = ours(batch)
    assert reference.std() > 0.1
    assert (velocity - reference).abs().max() <= 2e-4 * max(1.0, reference.abs().max())


def test_diffusers_builds_the_image_variant_too(tmp_path, from_diffusers):
    model = {"variant": "i2v", "image_position": True, "clip_dim": 16}
    base = tmp_path / "base.safetensors"
    random_base(base, tiny_wan_of(tmp_path, **model), layout="diffusers")
    folder = export(trained(tmp_path / "one", "stage1", model, base=base), tmp_path / "out", "--format", "diffusers")
    theirs, ours = from_diffusers(folder), load_export(folder).video
    batch = make_batch(ours.params, size=1, text_tokens=512, clip_tokens=514)
    hidden = torch.cat((batch.latents, batch.image_latents), dim=1)
    with torch.no_grad():
        clip = batch.clip.unflatten(1, (2, 257)).flatten(0, 1)
        reference = theirs(hidden, batch.timestep, batch.text, clip, return_dict=False)[0]
        assert (ours(batch) - reference).abs().max() <= 2e-4 * max(1.0, reference.abs().max())


def test_a_widened_base_is_exported_as_the_network_has_it(tmp_path):
    narrow, wide = (tiny_wan_of(tmp_path, variant=variant, clip_dim=16) for variant in ("i2v", "control"))
    base = tmp_path / "base.safetensors"
    state = random_base(base, narrow)
    model = {"variant": "control", "clip_dim": 16}
    run = trained(tmp_path / "one", "stage1", model, base=base, widen_input=True)
    weight = video_of(export(run, tmp_path / "x.safetensors"), wide, torch.float32)["patch_embedding.weight"]
    assert torch.equal(weight[:, :36], state["patch_embedding.weight"])
    assert not weight[:, 36:].any()


@pytest.mark.parametrize(
    ("word", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_the_dtype_that_is_asked_for(runs, tmp_path, word, dtype):
    path = export(runs["stage1"], tmp_path / "x.safetensors", "--dtype", word)
    tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {dtype}
    source = load_file(runs["stage1"])
    assert all(torch.equal(tensors[f"geometry.{name}"], t.to(dtype)) for name, t in source.items())
    base = load_file(runs["base"])  # rounded as it was for training, then converted
    assert all(torch.equal(tensors[name], t.bfloat16().to(dtype)) for name, t in base.items())
    assert next(load_export(path).parameters()).dtype == dtype


# What is refused.


def test_values_beyond_fp16_are_an_error_that_leaves_nothing(tmp_path, capsys):
    wan = tiny_wan_of(tmp_path)
    state = random_base(tmp_path / "base.safetensors", wan)
    state["blocks.1.ffn.0.bias"][3] = -70_000
    save_file(state, tmp_path / "base.safetensors")
    run = trained(tmp_path / "one", "stage1", base=tmp_path / "base.safetensors")
    for output in ("x.safetensors", "folder"):
        assert main(["export", str(run), "--output", str(tmp_path / output), "--dtype", "fp16"]) == 1
        assert "`blocks.1.ffn.0.bias` reaches 7e+04, more than fp16 can hold" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if "x.saf" in path.name or "folder" in path.name] == []


def test_another_base_is_refused(runs, tmp_path, capsys):
    random_base(tmp_path / "other.safetensors", tiny_wan_of(tmp_path), seed=5)
    words = ["export", str(runs["stage1"]), f"weights.base={tmp_path / 'other.safetensors'}"]
    assert main([*words, "--output", str(tmp_path / "x.safetensors")]) == 1
    assert "it was trained on the base" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_a_base_of_fresh_weights_is_in_no_file(tmp_path, capsys):
    run = trained(tmp_path / "one", "stage1")
    assert main(["export", str(run), "--output", str(tmp_path / "x.safetensors")]) == 1
    assert "fresh weights of seed 0, which are in no file; use --trainable" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["x.safetensors", "folder"])
def test_nothing_is_overwritten_unless_forced(runs, tmp_path, capsys, output):
    path = export(runs["stage1"], tmp_path / output, "--max-shard", "30KB")
    before = {file.name: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}
    assert main(["export", str(runs["stage2"]), "--output", str(path)]) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert before == {file.name: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}
    export(runs["stage2"], path, "--force")
    assert open_checkpoint(path).metadata["stage"] == "stage2"
    assert path.is_file() or [file.name for file in path.iterdir()] == ["model.safetensors"]


def test_a_folder_with_anything_else_is_never_replaced(runs, tmp_path, capsys):
    for name in ("mine.txt", "step-3.safetensors", "optimiser/model.safetensors"):
        folder = tmp_path / f"in_{name.partition('/')[0]}"[:8]
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("precious")
        assert main(["export", str(runs["stage1"]), "--output", str(folder), "--force"]) == 1
        assert f"holds what no export writes ({name.split('/')[0]})" in capsys.readouterr().err
        assert (folder / name).read_text() == "precious"
    (tmp_path / "empty").mkdir()
    export(runs["stage1"], tmp_path / "empty")


@pytest.mark.parametrize("output", ["x.safetensors", "folder"])
def test_a_failure_leaves_what_was_there_and_nothing_else(runs, tmp_path, output):
    path = export(runs["stage1"], tmp_path / output)
    before = open_checkpoint(path).files
    checkpoint = runs["stage2"]
    config = config_of(checkpoint, read_stage_info(checkpoint))
    plan = plan_export(checkpoint, config, "merged", "original")

    def fails():
        raise OSError("the disk is gone")

    plan.tensors[40] = plan.tensors[40]._replace(read=fails)
    with pytest.raises(OSError, match="the disk is gone"):
        write_export(path, plan, shard_bytes=30_000, force=True)
    assert open_checkpoint(path).files == before
    assert [child.name for child in tmp_path.iterdir() if child.name != "cache"] == [output]


def test_what_killed_writers_left_goes(runs, tmp_path):
    (tmp_path / ".out.0123abcd.tmp").mkdir()
    (tmp_path / ".out.0123abcd.tmp" / "model.safetensors").write_text("half")
    (tmp_path / ".other.0123abcd.tmp").mkdir()
    export(runs["stage1"], tmp_path / "out")
    assert {child.name for child in tmp_path.iterdir()} == {"out", ".other.0123abcd.tmp", "cache"}


def test_only_whole_merged_exports_become_networks(runs, tmp_path):
    trainable = export(runs["stage1"], tmp_path / "t.safetensors", "--trainable")
    with pytest.raises(CheckpointError, match="holds trained weights alone"):
        load_export(trainable)
    with pytest.raises(CheckpointError, match="is no export"):
        load_export(runs["stage1"])
    merged = export(runs["stage1"], tmp_path / "m.safetensors")
    tensors, metadata = load_file(merged), open_checkpoint(merged).metadata
    del tensors["geometry.token_camera"]
    tensors["geometry.token_camer"] = torch.zeros(1)
    save_file(tensors, merged, metadata)
    with pytest.raises(CheckpointError, match=r"missing: 1 \(token_camera\); unexpected: 1 \(geometry.token_camer\)"):
        load_export(merged)


# Files.


def test_shards_hold_at_most_what_is_allowed():
    info = TensorInfo((100,), torch.float32)

    def tensors(*sizes):
        return [ExportedTensor(str(n), info._replace(shape=(size,)), lambda: None) for n, size in enumerate(sizes)]

    assert [len(shard) for shard in split(tensors(25, 25, 25, 26, 1000, 1), 400)] == [3, 1, 1, 1]
    assert [len(shard) for shard in split(tensors(100), 400)] == [1]
    assert [len(shard) for shard in split(tensors(101), 400)] == [1]


def test_a_sharded_folder_has_the_index_of_its_layout(runs, tmp_path):
    for layout, stem in (("original", "model"), ("diffusers", "diffusion_pytorch_model")):
        folder = export(runs["stage2"], tmp_path / layout, "--format", layout, "--max-shard", "40KB")
        index = json.loads((folder / f"{stem}.safetensors.index.json").read_text())
        names = set(index["weight_map"].values())
        assert names == {path.name for path in folder.glob("*.safetensors")}
        assert len(names) > 2
        tensors = {name: t for file in names for name, t in load_file(folder / file).items()}
        assert tensors.keys() == index["weight_map"].keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert all(sum(t.nbytes for t in load_file(folder / name).values()) <= 40_000 for name in names)
        assert (folder / "config.json").exists() == (layout == "diffusers")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5_000_000_000), ("200MB", 200_000_000), ("1.5KB", 1500), ("7B", 7)])
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "5", "0GB", "5 TB", "-1GB", "GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


def test_the_printed_hashes_are_those_of_the_files(runs, tmp_path, capsys):
    export(runs["stage1"], tmp_path / "out", "--max-shard", "30KB")
    printed = capsys.readouterr().out
    check = "".join(f"{line.split()[0]}  {line.split()[1]}\n" for line in printed.splitlines())
    subprocess.run(["sha256sum", "--check", "--quiet"], input=check, text=True, check=True)


# Memory.

MEASURED = """
import sys
from pathlib import Path
import torch
from fw_train.export.tensors import plan_export
from fw_train.export.writing import write_export

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

plan = plan_export(Path(sys.argv[1]), None, "trainable", "original", torch.bfloat16)
write_export(Path(sys.argv[2]) / "once", plan._replace(tensors=plan.tensors[:2]))  # what is only ever loaded is loaded
open("/proc/self/clear_refs", "w").write("5")  # starts the peak anew
before = peak()
write_export(Path(sys.argv[2]) / "all", plan, shard_bytes=32_000_000)
print(peak() - before)
"""


def test_an_export_holds_a_few_tensors_of_many(tmp_path):
    count, each = 64, 1024 * 1024 * 4
    path = tmp_path / "step-1.safetensors"
    tensors = {f"geo_blocks.{n}.ffn.0.weight": torch.zeros(1024, 1024) for n in range(count)}
    write_stage_weights(path, tensors, StageInfo("stage1", 1, "c", "b", torch.float32))
    command = [sys.executable, "-c", MEASURED, path, tmp_path / "out"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "out")
    path.unlink()
    assert int(run.stdout) < 8 * each < count * each / 7
