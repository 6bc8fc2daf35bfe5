"""Everything that would stop a start is found, all of it at once, at full size and for whole clusters, in seconds."""

import json
import math
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from sidecars import make_sidecar, noise_facts
from tiny_training import make_data, write_config

from fw_train.atomic_files import write_file
from fw_train.build import load_model, trainable_shapes, world_params
from fw_train.cli import main
from fw_train.config import load_config
from fw_train.data.manifest import (
    Dataset,
    IndexHeader,
    LabelTotals,
    Settings,
    ShardIndex,
    Totals,
    dataset_files,
    index_bytes,
    index_path,
    write_dataset_files,
)
from fw_train.data.order import rank_slice
from fw_train.data.schema import SUFFIXES
from fw_train.data.shards import write_tar
from fw_train.plan.dry_run import _samples, _sharding, dry_run
from fw_train.plan.estimate import planned_parameters
from fw_train.plan.memory import meta_model
from fw_train.plan.shards import owned
from fw_train.run.data import open_data
from fw_train.run.folder import RunFolder
from fw_train.weights.stage import FORMAT, StageInfo, write_stage_weights

KINDS = ("text", "clip", "latent", "image")
WHOLE = {"stage1": 64, "stage2": 112}  # GPUs of the two published schedules


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def write(tmp_path, data):
    def config(source=data, **sections):
        return write_config(tmp_path / "config.yaml", source, tmp_path / "out", **sections)

    return config


def said(path, *words, world=1, allowed=()):
    lines = []
    code = dry_run(load_config(path, words), allowed, world, lines.append)
    return code, "\n".join(lines)


def wrong(text):
    return [line.split()[1] for line in text.splitlines() if line.startswith("WRONG")]


def test_a_start_that_would_work_is_said_to(write, tmp_path):
    code, text = said(write(), world=2)
    assert code == 0, text
    assert "a start on 2 GPUs finds everything in place" in text
    assert "ok     batch       4 = 2 GPUs x micro-batch 1 x 2 accumulated" in text
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_all_problems_are_found_at_once(write, tmp_path):
    path = write(tmp_path / "nowhere", data={"validation": "also/nowhere"}, weights={"base": str(tmp_path / "none")})
    (tmp_path / "out").write_text("a file")
    code, text = said(path, world=3)
    assert code == 1
    assert wrong(text) == ["batch", "output", "data", "validation", "base"], text
    assert "use one of [1, 2, 4] GPUs" in text
    assert text.endswith("5 problems")


def test_every_missing_sidecar_is_named(write):
    code, text = said(write(), "model.variant=i2v")
    assert code == 1
    assert "clip is missing: no sidecar.jsonl" in text
    assert "image is missing: no sidecar.jsonl" in text


def test_text_that_is_too_long_is_refused(write):
    code, text = said(write(data={"text_tokens": 3}))
    assert (code, wrong(text)) == (1, ["data"]), text
    assert "has 4 tokens, data.text_tokens is 3; raise that" in text


def test_a_folder_in_use_is_refused_and_stays_its_owners(write, tmp_path):
    folder = RunFolder.claim(tmp_path / "out")
    try:
        code, text = said(write())
        assert (code, wrong(text)) == (1, ["output"])
        assert "is in use by" in text
        assert folder.still_mine()
    finally:
        folder.release()
    assert said(write())[0] == 0


def test_a_disk_without_room_is_refused(write, monkeypatch):
    monkeypatch.setattr("fw_train.plan.dry_run.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    code, text = said(write())
    assert (code, wrong(text)) == (1, ["output"])
    assert "checkpoints and one being written need" in text


def test_a_base_of_another_shape_is_refused_by_its_header(write, tmp_path):
    path = write()
    video = load_model(load_config(path, ["train.stage=stage0"]), "cpu").video
    base = tmp_path / "base.safetensors"
    info = StageInfo("stage0", 1, "config", "base", torch.float32)
    write_stage_weights(base, {f"video.{name}": p for name, p in video.named_parameters()}, info)
    code, text = said(path, f"weights.base={base}")
    assert code == 0, text
    assert "its hash is not known yet" in text
    code, text = said(path, f"weights.base={base}", "model.ffn_dim=48")
    assert wrong(text) == ["base"]
    assert "set model.ffn_dim=32" in text


def test_what_was_encoded_otherwise_is_refused(write, data, tmp_path):
    path = write()
    copy = shutil.copytree(data, tmp_path / "copy")
    make_sidecar(Dataset(copy), "text", noise_facts("text", encoder="another"))
    video = load_model(load_config(path, ["train.stage=stage0"]), "cpu").video
    base = tmp_path / "base.safetensors"
    trained = {"text": noise_facts("text"), "latent": {"encoder": "another VAE"}}
    info = StageInfo("stage0", 1, "config", "base", torch.float32, trained)
    write_stage_weights(base, {f"video.{name}": p for name, p in video.named_parameters()}, info)
    words = (f"data.validation={copy}", f"weights.base={base}")
    code, text = said(path, *words)
    assert (code, wrong(text)) == (1, ["encoders", "encoders"]), text
    assert "(`text` has the fingerprint" in text
    assert "encoder: 'another VAE' there, 'noise' here" in text
    assert said(path, *words, allowed=("weights.base", "data.validation"))[0] == 0


def test_a_vae_that_cannot_be_loaded_is_refused(write, tmp_path):
    online = ("data.latents=online", f"data.vae={tmp_path}")
    code, text = said(write(), *online)
    assert (code, wrong(text)) == (1, ["encoders"]), text
    assert "holds no VAE" in text
    code, text = said(write(), "data.latents=online", "data.vae=dct")
    assert code == 0, text


def test_sharding_that_loses_an_element_is_found(write, monkeypatch):
    config = load_config(write())
    monkeypatch.setattr("fw_train.plan.dry_run.owned", lambda *given: owned(*given)[given[2] :])
    with pytest.raises(ValueError, match="is held by no rank|are missing"):
        _sharding(config, planned_parameters(config), 2)


def test_samples_that_two_ranks_take_are_found(write, monkeypatch):
    config = load_config(write())
    monkeypatch.setattr("fw_train.plan.dry_run.rank_slice", lambda g, **layout: rank_slice(g, **{**layout, "rank": 0}))
    data = open_data(config, world_params(config).wan)
    with pytest.raises(ValueError, match="are not the global batch"):
        _samples(config, 2, data, None)


def make_full_size(folder, buckets=("336x592x81", "592x336x81")):
    """A dataset whose manifest and sidecars are those of real clips; the members are bytes that nobody reads."""
    folder.mkdir()
    indexes = []
    for number, bucket in enumerate(buckets):
        samples = [(f"s{number}k{i:02}", dict.fromkeys(SUFFIXES, b"x")) for i in range(20)]
        name = f"shard-{number:06}"
        with open(folder / f"{name}.tar", "wb") as file:
            tar = write_tar(file, samples)
        labels = LabelTotals(encoded_bytes=20 * 3_470_000)
        totals = Totals(samples=20, video_bytes=20, depth=labels, points=labels)
        header = IndexHeader(1, name, bucket, "plan", Settings("default", None, 128), tar.bytes, tar.sha256, 0, totals)
        indexes.append(ShardIndex(header, tar.samples, ()))
        write_file(index_path(folder, name), index_bytes(indexes[-1]))
    write_dataset_files(folder, dataset_files(indexes))
    dataset = Dataset(folder)
    for kind in KINDS:
        shape = {"text": (7, 8), "clip": (257, 8)}.get(kind, (16, 1, 2, 2))
        make_sidecar(dataset, kind, noise_facts(kind), lambda *_, shape=shape: torch.zeros(shape))
    return folder


def hollow_safetensors(path, shapes, metadata):
    """A file with the header of such weights and a hole where they would be: it takes no room."""
    entries, offset = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    return path


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Overrides for the shipped configurations: data and weights of their real shapes."""
    folder = tmp_path_factory.mktemp("full")
    data = make_full_size(folder / "data")
    model = meta_model(load_config("configs/stage2.yaml"))
    video = {name: tuple(p.shape) for name, p in model.video.named_parameters()}
    base = hollow_safetensors(folder / "base.safetensors", video, {})
    trained = {name: info.shape for name, info in trainable_shapes(model, "stage1").items()}
    facts = {
        "format": FORMAT,
        "stage": "stage1",
        "step": "20000",
        "config_hash": "c",
        "base_hash": "b",
        "dtype": "bfloat16",
    }
    stage1 = hollow_safetensors(folder / "step-20000.safetensors", trained, facts)
    common = [
        f"data.sources=[{{path: {data}}}]",
        f"data.validation={data}",
        f"weights.base={base}",
        "data.text_tokens=512",
    ]
    common += [f"run.output={folder / 'out'}", "run.keep_last=1"]
    return {
        "stage1": [*common, "data.sizes_px=[[336,592],[592,336]]"],
        "stage2": [*common, f"weights.init_from={stage1}"],
    }


@pytest.fixture
def large_disk(monkeypatch):
    """Room for checkpoints of the full size, which the machine of a test need not have."""
    monkeypatch.setattr("fw_train.plan.dry_run.shutil.disk_usage", lambda _: SimpleNamespace(free=10**13))


@pytest.mark.usefixtures("large_disk")
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_published_schedules_start_on_their_clusters(stage, full_size, capsys):
    code = main(["train", f"configs/{stage}.yaml", "--dry-run", "--world", str(WHOLE[stage]), *full_size[stage]])
    text = capsys.readouterr().out
    assert code == 0, text
    assert f"a start on {WHOLE[stage]} GPUs finds everything in place" in text
    assert f"ok     sharding    {WHOLE[stage]} ranks master 1," in text
    assert f"the {WHOLE[stage]} ranks take the global batch of each, every sample once" in text
    if stage == "stage2":
        assert "step 20000 of stage1" in text


@pytest.mark.usefixtures("large_disk")
def test_96_gpus_are_refused_in_stage_1_with_those_that_work(full_size, capsys):
    assert main(["train", "configs/stage1.yaml", "--dry-run", "--world", "96", *full_size["stage1"]]) == 1
    text = capsys.readouterr().out
    assert wrong(text) == ["batch"]
    assert "with micro_batch 1 use one of [1, 2, 4, 8, 16, 32, 64] GPUs" in text
    assert text.endswith("1 problem\n")


def test_a_world_without_dry_run_is_refused(write, capsys):
    assert main(["train", str(write()), "--world", "2"]) == 1
    assert "--world belongs to --dry-run" in capsys.readouterr().err
