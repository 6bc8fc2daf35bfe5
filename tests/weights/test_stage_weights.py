"""Stage weights: written whole or not at all, checked by their header, loaded all or none."""

import errno
import os
import re
import resource
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fw_train.build import build_model, initialise, on_meta
from fw_train.model.wan import WanDiT
from fw_train.model.world import FantasyWorldModel
from fw_train.weights.files import CheckpointError, CheckpointReader, TensorInfo, open_checkpoint
from fw_train.weights.stage import (
    StageInfo,
    load_stage_weights,
    read_stage_info,
    stored_encodings,
    validate_stage_weights,
    write_stage_weights,
)
from fw_train.weights.wan import load_wan
from samples import make_batch, tiny_params

BASE = "ba5e" * 16
INFO = StageInfo("stage1", 20_000, "c0ff", BASE, torch.bfloat16)
PARAMS = tiny_params("camera", layers=6)


def trained_model(dtype=torch.bfloat16, seed=1):
    """Every parameter has its own noise, gates and adapters too."""
    model = build_model(PARAMS, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def of_stage1(model):
    frozen = ("video.", "camera_adapters.", "irg_cross_attns.")
    return {name: p for name, p in model.named_parameters() if not name.startswith(frozen)}


def expected_of(tensors):
    return {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def model():
    return trained_model()


@pytest.fixture
def tensors(model):
    return of_stage1(model)


@pytest.fixture
def path(tmp_path, tensors):
    write_stage_weights(tmp_path / "step-20000.safetensors", tensors, INFO)
    return tmp_path / "step-20000.safetensors"


def problems(path, tensors, stage="stage1", base=BASE):
    with pytest.raises(CheckpointError) as error:
        validate_stage_weights(path, expected_of(tensors), stage, base)
    return str(error.value)


# Writing.


def test_the_file_holds_the_weights_and_says_what_they_are(path, tensors):
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensors[name]) for name in stored)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {
            "format": "fw_train.weights.stage.v1",
            "stage": "stage1",
            "step": "20000",
            "config_hash": "c0ff",
            "base_hash": BASE,
            "dtype": "bfloat16",
        }
    assert read_stage_info(path) == INFO
    assert validate_stage_weights(path, expected_of(tensors), "stage1", BASE) == INFO


def test_the_file_says_what_its_data_were_encoded_with(tmp_path, tensors):
    info = INFO._replace(encodings={"text": {"encoder": "hash:64", "version": 2}, "latent": {"mean": [0.5, -1.0]}})
    write_stage_weights(tmp_path / "x.safetensors", tensors, info)
    assert read_stage_info(tmp_path / "x.safetensors") == info


def test_the_metadata_of_foreign_weights_are_left_alone(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"encodings": "utf-8"})
    assert stored_encodings(open_checkpoint(tmp_path / "x.safetensors")) is None


def test_colleagues_can_read_the_file_and_nothing_else_is_left(path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(path.parent) == [path.name]


def test_views_of_a_larger_buffer_are_written(tmp_path):
    """Engines keep parameters as slices of one flat tensor."""
    flat = torch.arange(12.0)
    tensors = {"a": flat[:4].view(2, 2), "b": flat[4:].view(4, 2).T}
    write_stage_weights(tmp_path / "x.safetensors", tensors, INFO._replace(dtype=torch.float32))
    stored = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(stored[name], tensors[name]) for name in tensors)
    assert (tmp_path / "x.safetensors").stat().st_size < 1000


def test_the_folder_is_made(tmp_path, tensors):
    write_stage_weights(tmp_path / "outputs" / "run" / "step-1.safetensors", tensors, INFO)
    assert (tmp_path / "outputs" / "run" / "step-1.safetensors").is_file()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, tensors):
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # the kernel refuses to write any further
    try:
        with pytest.raises(OSError, match="could not be written .*Errno 27.*as it was before"):
            write_stage_weights(path, tensors, INFO._replace(step=20_001))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(path, tensors, monkeypatch):
    before = path.read_bytes()

    def failing_sync(descriptor):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", failing_sync)
    with pytest.raises(OSError, match="input/output error"):
        write_stage_weights(path, tensors, INFO._replace(step=20_001))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_leftover_of_a_killed_writer_is_overwritten(path, tensors):
    leftover = path.with_name(f".{path.name}.0123abcd.tmp")
    leftover.write_bytes(b"half")
    write_stage_weights(path, tensors, INFO._replace(step=20_001))
    assert read_stage_info(path).step == 20_001
    assert os.listdir(path.parent) == [path.name]


def test_the_data_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, tensors, monkeypatch):
    events = []
    real_sync, real_rename = os.fsync, os.rename

    def seen_sync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def seen_rename(source, target):
        events.append(("rename", str(target)))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_sync)
    monkeypatch.setattr(os, "rename", seen_rename)
    path = tmp_path / "x.safetensors"
    write_stage_weights(path, tensors, INFO)
    assert [(what, re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", where)) for what, where in events] == [
        ("sync", str(tmp_path / ".x.safetensors.tmp")),
        ("rename", str(path)),
        ("sync", str(tmp_path)),
    ]


@pytest.mark.parametrize(
    ("tensors", "info", "message"),
    [
        ({"a": torch.zeros(1)}, INFO, r"another dtype 1 \(a torch\.float32\)"),
        ({}, INFO, "got 0 tensors"),
        ({"a": torch.zeros(1).double()}, INFO._replace(dtype=torch.float64), "one dtype of bfloat16, float16, float32"),
        ({"geo_blocks.0.a": torch.zeros(1).bfloat16()}, INFO._replace(stage="stage0"), "no part of it"),
    ],
)
def test_what_is_not_stage_weights_is_not_written(tmp_path, tensors, info, message):
    with pytest.raises(CheckpointError, match=message):
        write_stage_weights(tmp_path / "x.safetensors", tensors, info)
    assert not os.listdir(tmp_path)


# Checking.


def test_weights_of_another_stage(tmp_path, tensors, model, path):
    text = problems(path, tensors, stage="stage0")
    assert "it holds the weights of stage1 (step 20000), those of stage0 are expected" in text
    second = tmp_path / "two.safetensors"
    everything = {name: p for name, p in model.named_parameters() if not name.startswith("video.")}
    write_stage_weights(second, everything, INFO._replace(stage="stage2", step=7))
    text = problems(second, tensors)
    assert "it holds the weights of stage2 (step 7), those of stage1 are expected" in text
    assert "unexpected: " in text
    assert "irg_cross_attns.0." in text or "camera_adapters.0." in text


def test_weights_of_another_base(path, tensors):
    text = problems(path, tensors, base="f00d" * 16)
    assert "trained on the base ba5eba5eba5eba5e..., weights.base is f00df00df00df00d...: give the base" in text
    assert "missing" not in text


def test_everything_wrong_is_in_one_error(path, tensors):
    wanted = dict(tensors)
    wanted["geo_blocks.9.extra"] = torch.zeros(1).bfloat16()
    del wanted["token_camera"]
    wanted["tokens_register"] = torch.zeros(1, 5, 48).bfloat16()
    wanted["geo_blocks.0.modulation"] = wanted["geo_blocks.0.modulation"].float()
    text = problems(path, wanted, stage="stage2", base="f00d" * 16)
    for part in (
        "step-20000.safetensors is not what this run starts from",
        "those of stage2 are expected",
        "weights.base is f00d",
        "missing: 1 (geo_blocks.9.extra)",
        "unexpected: 1 (token_camera)",
        "of another shape: 1 (tokens_register [1, 4, 48], expected [1, 5, 48])",
        "of another dtype: 1 (geo_blocks.0.modulation torch.bfloat16, expected torch.float32)",
    ):
        assert part in text


def test_a_file_that_is_no_stage_weights(tmp_path, tensors):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        assert "is not a file of stage weights" in problems(tmp_path / name, tensors)
        with pytest.raises(CheckpointError, match="not a file of stage weights"):
            read_stage_info(tmp_path / name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "many"),
        ("step", "-1"),
        ("dtype", "int8"),
        ("stage", ""),
        ("base_hash", None),
        ("encodings", "{"),
        ("encodings", "[]"),
        ("encodings", '{"text": 1}'),
    ],
)
def test_metadata_that_make_no_sense(path, field, value):
    metadata = open_checkpoint(path).metadata
    if value is None:
        del metadata[field]
    else:
        metadata[field] = value
    save_file(load_file(path), path, metadata)
    with pytest.raises(CheckpointError, match=re.escape(f"make no sense: {field}={value or ''!r}")):
        read_stage_info(path)


def test_a_truncated_file(path, tensors):
    os.truncate(path, path.stat().st_size - 1)
    assert "is truncated" in problems(path, tensors)


def test_checking_reads_the_header_alone(path, tensors, monkeypatch):
    monkeypatch.setattr(CheckpointReader, "tensor", None)
    assert validate_stage_weights(path, expected_of(tensors), "stage1", BASE) == INFO


# Loading.


@pytest.mark.parametrize("on", ["meta", "cpu"])
def test_the_next_stage_starts_with_the_weights(path, tensors, on):
    fresh = on_meta(lambda: FantasyWorldModel(PARAMS), torch.bfloat16)
    if on == "cpu":
        initialise(fresh, "cpu", seed=7)
    fresh.requires_grad_(False)
    fresh.geo_blocks.requires_grad_(True)
    assert load_stage_weights(fresh, path, "cpu") == INFO
    initialise(fresh, "cpu", seed=7)
    untouched = build_model(PARAMS, torch.bfloat16, seed=7)
    for (name, parameter), other in zip(fresh.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(parameter, tensors.get(name, other)), name
        assert parameter.requires_grad == name.startswith("geo_blocks.")


def altered(path, change):
    tensors, metadata = load_file(path), open_checkpoint(path).metadata
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(unknown=torch.zeros(1)), r"unexpected: 1 \(unknown\)"),
        (lambda t: t.update(token_camera=torch.zeros(2).bfloat16()), r"token_camera \[2\], expected \[1, 1, 48\]"),
        (
            lambda t: t.update(token_camera=t["token_camera"].float()),
            r"token_camera torch\.float32, expected torch\.bf",
        ),
    ],
)
def test_weights_that_do_not_fit_change_nothing(path, change, message):
    altered(path, change)
    fresh = build_model(PARAMS, torch.bfloat16, seed=7)
    before = list(fresh.parameters())
    with pytest.raises(CheckpointError, match=message):
        load_stage_weights(fresh, path, "cpu")
    assert all(a is b for a, b in zip(before, fresh.parameters(), strict=True))


def test_a_read_that_fails_half_way_changes_nothing(path, monkeypatch):
    fresh = build_model(PARAMS, torch.bfloat16, seed=7)
    before = list(fresh.parameters())
    original, reads = CheckpointReader.tensor, []

    def tensor(reader, key):
        reads.append(key)
        if len(reads) == 20:
            os.truncate(path, path.stat().st_size - 1)
        return original(reader, key)

    monkeypatch.setattr(CheckpointReader, "tensor", tensor)
    with pytest.raises(CheckpointError, match="has changed while it was being read"):
        load_stage_weights(fresh, path, "cpu")
    assert len(reads) == 20
    assert all(a is b for a, b in zip(before, fresh.parameters(), strict=True))


# Stage 0 trains the video transformer itself.


def test_stage_0_is_accepted_as_a_base_checkpoint(tmp_path, model):
    path = tmp_path / "step-100.safetensors"
    info = INFO._replace(stage="stage0", step=100)
    video = {name: p for name, p in model.named_parameters() if name.startswith("video.")}
    write_stage_weights(path, video, info)
    assert open_checkpoint(path).shapes().keys() == dict(model.video.named_parameters()).keys()
    assert validate_stage_weights(path, expected_of(video), "stage0", BASE) == info

    base = on_meta(lambda: WanDiT(PARAMS.wan), torch.bfloat16)
    assert load_wan(base, path, "cpu").layout == "original"
    whole = on_meta(lambda: FantasyWorldModel(PARAMS), torch.bfloat16)
    load_stage_weights(whole, path, "cpu")
    batch = make_batch(PARAMS.wan, dtype=torch.bfloat16)
    with torch.no_grad():
        velocity = model.video(batch)
        assert torch.equal(base(batch), velocity)
        assert torch.equal(whole.video(batch), velocity)


def test_later_stages_are_not_accepted_as_a_base_checkpoint(path):
    with pytest.raises(CheckpointError, match="these are the trained weights of stage1; the base is a Wan checkpoint"):
        load_wan(on_meta(lambda: WanDiT(PARAMS.wan), torch.bfloat16), path, "cpu")


def test_expected_weights_may_be_given_as_plain_pairs_or_infos(path, tensors):
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    assert validate_stage_weights(path, infos, "stage1", BASE) == INFO
