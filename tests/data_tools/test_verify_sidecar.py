import random
import shutil

import pytest
from data_commands import command
from raw_clips import make_raw, write_clip, write_metadata
from sidecars import make_sidecar, noise_facts, noise_tensor

from data_tools import encode, info, pack, verify
from fw_train.data.manifest import Dataset, seal, unseal
from fw_train.data.sidecar_files import read_index, write_shard

MEMBERS = ("latent", "text")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    entries = make_raw(folder / "raw", clips=2)
    write_metadata(folder / "raw", [*entries, write_clip(folder / "raw", "tall", height=48, width=32)])
    command(pack, folder / "raw", folder / "out", "--workers", 1)
    words = ("--codec", "dct", "--text", "hash:16", "--members", ",".join(MEMBERS), "--workers", 1)
    command(encode, folder / "out", *words)
    return folder / "out"


@pytest.fixture
def out(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def problems(folder, fast=False):
    return verify.verify(folder, fast).problems


def sidecar_paths(folder):
    return sorted(path for kind in MEMBERS for path in (folder / kind).iterdir())


def test_encoded_folders_are_checked_and_counted(out, capsys):
    assert command(verify, out, "--workers", 1) == 0
    assert "3 samples in 2 shards, encoded in 2 folders beside them; everything is in order" in capsys.readouterr().out
    assert len(sidecar_paths(out)) == 2 * 6 + 1


@pytest.mark.parametrize("fast", [False, True])
def test_every_missing_or_truncated_file_is_named(out, fast):
    for path in sidecar_paths(out):
        name, data = str(path.relative_to(out)), path.read_bytes()
        path.unlink()
        assert any(p.file == name and "missing" in p.what for p in problems(out, fast)), name
        for length in (0, 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            assert name in {problem.file for problem in problems(out, fast)}, (name, length)
        path.write_bytes(data)
    assert problems(out, fast) == []


def test_every_flipped_bit_is_found_and_named(out):
    rng = random.Random(0)
    for path in sidecar_paths(out):
        name, data = str(path.relative_to(out)), path.read_bytes()
        for bit in (0, 8 * len(data) - 1, *(rng.randrange(8 * len(data)) for _ in range(4))):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert name in {problem.file for problem in problems(out)}, (name, bit)
        path.write_bytes(data)


def test_a_damaged_member_is_named_with_its_key(out):
    place = read_index(out / "latent", "latent", "shard-000000").places[1]
    with open(out / "latent/shard-000000.tar", "r+b") as file:
        file.seek(place.offset + place.size - 1)
        file.write(b"\x99")
    (found,) = problems(out)
    assert found[:3] == ("latent/shard-000000.tar", "clip_1", "latent.safetensors")
    assert "CRC" in found.what
    assert problems(out, fast=True) == []


def test_folders_that_do_not_belong_to_the_dataset_are_named(out, made, tmp_path):
    shutil.copy(made / "latent/shard-000000.tar", out / "latent/shard-000007.tar")
    (found,) = problems(out)
    assert (found.file, found.what) == ("latent/shard-000007.tar", "belongs to no shard of the dataset")
    other = tmp_path / "other"
    command(pack, made.parent / "raw", other, "--preset", "tight", "--workers", 1)
    shutil.copytree(made / "latent", other / "latent")
    found = problems(other)
    assert {p.file for p in found} == {
        "latent/sidecar.jsonl",
        "latent/shard-000000.index.jsonl",
        "latent/shard-000001.index.jsonl",
    }
    assert all("other samples" in problem.what for problem in found)


def test_latents_of_another_shape_are_found(out):
    make_sidecar(Dataset(out), "image", tensor=lambda kind, row, _: noise_tensor(kind, row, (16, 2, 4, 6)))
    (found,) = problems(out)  # of the three the bucket of one is 48x32
    assert found[:3] == ("image/shard-000001.tar", "tall", "image.safetensors")
    assert "[16, 2, 4, 6], its bucket needs [16, 2, 6, 4]" in found.what


def test_keys_of_other_samples_are_found(out):
    dataset = Dataset(out)
    make_sidecar(dataset, "clip")
    assert problems(out) == []
    line = dataset.manifest.shards[0]
    tensors = [(key, noise_tensor("clip", 0)) for key in ("clip_0", "clip_2")]
    write_shard(out / "clip", "clip", line, noise_facts("clip"), tensors)
    found = problems(out)
    assert any(p.file == "clip/shard-000000.index.jsonl" and "keys are not those" in p.what for p in found)


def test_an_index_that_was_sealed_again_is_found(out):
    path = out / "latent/shard-000000.index.jsonl"
    lines = unseal(path.read_bytes(), "")
    lines[0]["tar_sha256"] = "0" * 64
    path.write_bytes(seal(lines))
    found = {problem.file: problem.what for problem in problems(out)}
    assert found.keys() == {"latent/shard-000000.tar", "latent/sidecar.jsonl"}
    assert "its SHA-256 is" in found["latent/shard-000000.tar"]
    assert "is not what the indexes of the shards give" in found["latent/sidecar.jsonl"]


def test_info_says_what_is_encoded(out, capsys):
    command(info, out)
    shown = capsys.readouterr().out
    assert "latent: " in shown
    assert "codec dct, version 1, dtype float16, size native" in shown
    assert "encoder hash:16" in shown
    assert "image" not in shown
    (out / "text/sidecar.jsonl").unlink()
    command(info, out)
    assert "sidecar.jsonl is missing" in capsys.readouterr().out
