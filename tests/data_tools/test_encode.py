import shutil
import subprocess
import sys

import pytest
import torch
from data_commands import command
from raw_clips import contents, make_raw, write_clip, write_metadata
from wan_encoders import save_diffusers, save_original

from data_tools import encode, pack
from data_tools.encode_sample import encode_sample
from data_tools.pack import Task
from fw_train.data import schema, sidecar_files
from fw_train.data.manifest import Dataset
from fw_train.data.shards import ShardError
from fw_train.data.sidecar import Sidecar, read_empty_text
from fw_train.data.sidecar_tensor import sidecar_facts
from fw_train.data.video import decode_video, to_rgb
from fw_train.dist import ALONE
from fw_train.encoders.latents import first_frame_video, load_latent_codec
from fw_train.encoders.text import load_text_encoder

SIMPLE = ("--codec", "dct", "--text", "hash:16", "--workers", 1)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Five clips of two sizes in three shards."""
    folder = tmp_path_factory.mktemp("packed")
    entries = make_raw(folder / "raw", clips=3)
    entries += [write_clip(folder / "raw", f"tall_{i}", frames=9, height=64, width=48) for i in range(2)]
    write_metadata(folder / "raw", entries)
    assert command(pack, folder / "raw", folder / "out", "--shard-size", 2, "--workers", 1) == 0
    return folder / "out"


@pytest.fixture
def out(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture(scope="module")
def encoded(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoded") / "out"
    shutil.copytree(packed, folder)
    assert command(encode, folder, *SIMPLE, "--members", "latent,image,text") == 0
    return folder


def video(dataset, row, frames):
    return to_rgb(decode_video(dataset.read(row, [schema.VIDEO])[schema.VIDEO], range(frames))).transpose(0, 1)[None]


def test_members_are_what_the_encoders_give(encoded):
    dataset, codec = Dataset(encoded), load_latent_codec("dct")
    sidecars = {kind: Sidecar(dataset, kind) for kind in ("latent", "image", "text")}
    assert len(dataset) == 5
    for row in range(5):
        info = schema.parse_info(dataset.read(row, ["json"])["json"], "")
        pixels = video(dataset, row, info.frames)
        latents = codec.encode(pixels)[0]
        assert torch.equal(sidecars["latent"].read(row)["latent"], latents.half())
        shown = codec.decode(sidecars["latent"].read(row)["latent"][None].float())
        assert (shown - pixels).abs().mean() < 0.2
        image = codec.encode(first_frame_video(pixels[:, :, 0], info.frames))[0]
        assert torch.equal(sidecars["image"].read(row)["image"], image.half())
        (text,) = load_text_encoder("hash:16").encode([info.caption])
        assert torch.equal(sidecars["text"].read(row)["text"], text.bfloat16())
    (empty,) = load_text_encoder("hash:16").encode([""])
    assert torch.equal(read_empty_text(dataset), empty.bfloat16())
    assert sidecars["latent"].facts == sidecar_facts("latent", {"codec": "dct", "version": 1})
    assert len({sidecar.fingerprint for sidecar in sidecars.values()}) == 3


def test_processes_and_tasks_give_the_same_bytes(encoded, out):
    members = ("--members", "latent,image,text")
    for number in (2, 3):
        assert command(encode, out, *SIMPLE, *members, "--task", f"{number}/3") == 0
        with pytest.raises(ShardError, match="is not finished"):
            Sidecar(Dataset(out), "latent")
    assert command(encode, out, *SIMPLE[:-1], 2, *members, "--task", "1/3") == 0
    assert contents(out) == contents(encoded)


def test_a_run_that_is_repeated_writes_missing_and_damaged_files_alone(encoded, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    (out / "latent/shard-000001.tar").unlink()
    (out / "latent/shard-000002.index.jsonl").write_bytes(b"{}")
    (out / "text/empty.text.safetensors").unlink()
    (out / "image/sidecar.jsonl").write_bytes(b"")
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert command(encode, out, *SIMPLE, "--members", "latent,image,text") == 0
    assert contents(out) == contents(encoded)
    changed = {
        str(path.relative_to(out))
        for path, time in written.items()
        if path.exists() and path.stat().st_mtime_ns != time
    }
    again = {"latent/shard-000001.index.jsonl", "latent/shard-000002.tar", "latent/shard-000002.index.jsonl"}
    assert changed <= {*again, "image/sidecar.jsonl"}


def test_a_killed_run_is_continued(encoded, out, monkeypatch):
    done = []

    def dying(recipe, dataset, row):
        if len(done) == 4:  # in the last shard
            raise KeyboardInterrupt
        done.append(row)
        return encode_sample(recipe, dataset, row)

    monkeypatch.setattr(encode, "encode_sample", dying)
    with pytest.raises(KeyboardInterrupt):
        command(encode, out, *SIMPLE, "--members", "latent")
    names = ["shard-000000.index.jsonl", "shard-000000.tar", "shard-000001.index.jsonl", "shard-000001.tar"]
    assert sorted(path.name for path in (out / "latent").iterdir()) == names
    monkeypatch.undo()
    assert command(encode, out, *SIMPLE, "--members", "latent,image,text") == 0
    assert contents(out) == contents(encoded)


def test_another_fingerprint_is_refused_until_it_shall_replace(encoded, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    before = contents(out)
    other = ("--codec", "dct", "--text", "hash:8", "--workers", 1)
    with pytest.raises(ShardError, match=r"encoded otherwise.*encoder: 'hash:16' there, 'hash:8' here.*--replace"):
        command(encode, out, *other, "--members", "text")
    with pytest.raises(ShardError, match="frames: 'native' there, 5 here"):
        command(encode, out, *SIMPLE, "--members", "latent", "--frames", 5)
    (out / "text/sidecar.jsonl").unlink()
    with pytest.raises(ShardError, match=r"shard-000000 was encoded otherwise"):
        command(encode, out, *other, "--members", "text")
    assert contents(out) == {name: data for name, data in before.items() if name != "text/sidecar.jsonl"}
    assert command(encode, out, *other, "--members", "text", "--replace") == 0
    assert Sidecar(Dataset(out), "text").read(4)["text"].shape[1] == 8


def test_while_a_part_is_replaced_the_folder_is_not_finished(encoded, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    smaller = (*SIMPLE, "--members", "latent", "--frames", 5, "--replace")
    assert command(encode, out, *smaller, "--task", "1/2") == 0
    with pytest.raises(ShardError, match="is not finished"):
        Sidecar(Dataset(out), "latent")
    with pytest.raises(ShardError, match="were not made alike"):
        command(encode, out, *smaller[:-1], "--task", "1/2")
    assert command(encode, out, *smaller, "--task", "2/2") == 0
    assert Sidecar(Dataset(out), "latent").read(4)["latent"].shape == (16, 2, 8, 6)


def test_a_replacement_that_is_killed_leaves_no_index_of_another_tar(encoded, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(encoded, out)

    def dying(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr(sidecar_files, "write_file", dying)
    with pytest.raises(KeyboardInterrupt):
        command(encode, out, "--text", "hash:17", "--workers", 1, "--replace")
    monkeypatch.undo()
    assert command(encode, out, *SIMPLE, "--members", "text") == 0
    assert contents(out) == contents(encoded)


def test_a_dataset_that_was_packed_anew_is_encoded_anew(encoded, packed, tmp_path):
    out = tmp_path / "out"
    raw = packed.parent / "raw"
    assert command(pack, raw, out, "--shard-size", 2, "--preset", "tight", "--workers", 1) == 0
    shutil.copytree(encoded / "latent", out / "latent")
    with pytest.raises(ShardError, match="other samples than the dataset has now.*--replace"):
        command(encode, out, *SIMPLE, "--members", "latent")
    with pytest.raises(ShardError, match="made for other samples"):
        Sidecar(Dataset(out), "latent")
    assert command(encode, out, *SIMPLE, "--members", "latent", "--replace") == 0
    assert Sidecar(Dataset(out), "latent").read(0)


def test_clips_are_cropped_to_cover_the_size(packed, out):
    assert command(encode, out, *SIMPLE, "--members", "latent,image", "--size", "32x32", "--frames", 5) == 0
    dataset, codec = Dataset(out), load_latent_codec("dct")
    sidecar = Sidecar(dataset, "latent")
    assert sidecar.facts["size"] == [32, 32]
    wide = video(dataset, 0, 5)[..., 8:40]  # 32x48, cut at both sides and not scaled
    assert torch.equal(sidecar.read(0)["latent"], codec.encode(wide)[0].half())
    assert sidecar.read(4)["latent"].shape == Sidecar(dataset, "image").read(4)["image"].shape == (16, 2, 4, 4)


def test_what_cannot_be_encoded_is_said_before_anything_is_written(out):
    before = contents(out)
    for words, message in (
        ((), "nothing says how to encode latent and text"),
        (("--codec", "dct", "--members", "latent,text"), "nothing says how to encode text: give --model"),
        (("--codec", "dct", "--text", "hash:8", "--members", "clip"), "nothing says how to encode clip"),
        (("--codec", "dct", "--frames", 9), "clips of 32x48x5 have 5"),
        (("--codec", "dct", "--frames", 4), "4"),
        (("--codec", "dct", "--size", "30x32"), "multiples of 16"),
        (("--codec", "wavelets"), "wavelets"),
    ):
        with pytest.raises(ValueError, match=message):
            command(encode, out, *words)
    for words in (("--members", "latent,depth"), ("--members", "text,text"), ("--size", "32"), ("--task", "0/3")):
        with pytest.raises(SystemExit):
            command(encode, out, *words)
    assert contents(out) == before


def test_models_in_both_layouts_give_the_same_members(packed, out, tmp_path):
    save_original(tmp_path / "original")
    save_diffusers(tmp_path / "diffusers")
    words = ("--members", "latent,image,text,clip", "--workers", 1, "--device", "cpu")
    assert command(encode, out, "--model", tmp_path / "original", *words) == 0
    before = contents(out)
    assert command(encode, out, "--model", tmp_path / "diffusers", *words, "--replace") == 0
    assert contents(out) == before
    dataset = Dataset(out)
    sidecars = {kind: Sidecar(dataset, kind) for kind in ("latent", "image", "text", "clip")}
    shapes = {kind: tuple(sidecar.read(4)[kind].shape) for kind, sidecar in sidecars.items()}
    tokens = shapes["text"][0]
    assert shapes == {"latent": (16, 3, 8, 6), "image": (16, 3, 8, 6), "text": (tokens, 16), "clip": (5, 160)}
    codec = load_latent_codec(tmp_path / "original")
    pixels = video(dataset, 4, 9)
    found = sidecars["image"].read(4)["image"].float()
    wanted = codec.encode(first_frame_video(pixels[:, :, 0], 9))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, sidecars["latent"].read(4)["latent"].float(), atol=0.01)
    with pytest.raises(ShardError, match="codec: 'wan_vae' there, 'dct' here"):
        command(encode, out, *SIMPLE, "--members", "latent")


def test_ranks_split_the_part_of_an_array_task():
    eight = [ALONE._replace(rank=rank, size=4) for rank in range(4)]
    parts = [encode.split_task(Task(number, 2), launch) for number in (1, 2) for launch in eight]
    assert parts == [Task(n, 8) for n in range(1, 9)]
    assert encode.split_task(Task(2, 3), ALONE) == Task(2, 3)


def test_ranks_share_the_shards(encoded, out, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for rank, shards in (("0", [0, 2]), ("1", [0, 1, 2])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert command(encode, out, *SIMPLE, "--members", "latent,image,text") == 0
        names = [f"shard-{number:06}.tar" for number in shards]
        assert sorted(path.name for path in (out / "latent").glob("*.tar")) == names
    assert contents(out) == contents(encoded)


@pytest.mark.slow
def test_torchrun_encodes(encoded, out):
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fw_train.cli",
        "data",
        "encode",
    ]
    words += [str(out), *map(str, SIMPLE), "--members", "latent,image,text"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(encoded)
