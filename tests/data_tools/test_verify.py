import io
import json
import os
import random
import re

import numpy as np
import pytest
from data_commands import command
from raw_clips import contents, make_raw, write_clip, write_metadata

from data_tools import pack, verify
from fw_train.data.codec import encode_depth
from fw_train.data.manifest import (
    Dataset,
    ShardIndex,
    dataset_files,
    index_bytes,
    index_path,
    read_index,
    seal,
    unseal,
    write_dataset_files,
)
from fw_train.data.shards import write_tar


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    entries = make_raw(folder / "raw", clips=3)
    write_metadata(folder / "raw", [*entries, {**write_clip(folder / "raw", "reject"), "height": 30}])
    assert command(pack, folder / "raw", folder / "out", "--shard-size", 2, "--workers", 1) == 0
    return folder / "out"


@pytest.fixture
def out(packed, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, data in contents(packed).items():
        (folder / name).write_bytes(data)
    return folder


def problems(folder, fast=False):
    return verify.verify(folder, fast).problems


def test_a_whole_dataset_is_in_order(out, capsys):
    assert command(verify, out, "--workers", 1) == 0
    assert "3 samples in 2 shards; everything is in order" in capsys.readouterr().out
    assert command(verify, out, "--workers", 1, "--fast") == 0


def files_of(folder):
    return sorted(contents(folder))


@pytest.mark.parametrize("fast", [False, True])
def test_every_missing_or_truncated_file_is_named(out, fast, capsys):
    names = files_of(out)
    assert len(names) == 7
    for name in names:
        data = (out / name).read_bytes()
        (out / name).unlink()
        found = problems(out, fast)
        assert any(problem.file == name and "missing" in problem.what for problem in found), (name, found)
        for length in (0, 1, len(data) // 2, len(data) - 1):
            (out / name).write_bytes(data[:length])
            assert name in {problem.file for problem in problems(out, fast)}, (name, length)
        (out / name).write_bytes(data)
    (out / names[0]).unlink()
    capsys.readouterr()
    assert command(verify, out, "--workers", 1, *["--fast"] * fast) == 1
    assert capsys.readouterr().out.startswith(f"{names[0]}: ")


def test_a_tar_cut_at_the_end_of_a_member_is_named(out):
    index = read_index(out, "shard-000001")
    cut = index.samples[1].members[0].offset - 512
    with open(out / "shard-000001.tar", "r+b") as file:
        file.truncate(cut)
        file.seek(cut)
        file.write(bytes(1024))
    for fast in (True, False):
        assert any(p.file == "shard-000001.tar" and p.key == "clip_2" for p in problems(out, fast))


def flip(path, bit):
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_is_found_and_named(out):
    rng = random.Random(0)
    for name in files_of(out):
        size = (out / name).stat().st_size
        bits = [0, 8 * size - 1, *(rng.randrange(8 * size) for _ in range(12))]
        for bit in bits:
            flip(out / name, bit)
            found = problems(out)
            assert name in {problem.file for problem in found}, (name, bit, found)
            flip(out / name, bit)
    assert problems(out) == []


def test_a_flipped_bit_is_named_with_key_and_member(out):
    for shard in ("shard-000000", "shard-000001"):
        for sample in read_index(out, shard).samples:
            for member in sample.members:
                for at in (member.offset, member.offset + member.size - 1):
                    flip(out / f"{shard}.tar", 8 * at + 3)
                    (found,) = problems(out)
                    assert found[:3] == (f"{shard}.tar", sample.key, member.suffix)
                    assert re.search(r"is damaged: CRC [0-9a-f]{8} instead of [0-9a-f]{8}", found.what)
                    flip(out / f"{shard}.tar", 8 * at + 3)
                flip(out / f"{shard}.tar", 8 * (member.offset - 512))  # its name in the header
                assert shard in problems(out, fast=True)[0].file
                flip(out / f"{shard}.tar", 8 * (member.offset - 512))


def test_a_shard_without_index_is_checked_by_the_manifest(out):
    member = read_index(out, "shard-000000").samples[0].members[1]
    (out / "shard-000000.index.jsonl").unlink()
    flip(out / "shard-000000.tar", 8 * (member.offset + member.size - 1))
    flip(out / "samples.bin", 8)
    assert {problem.file for problem in problems(out)} == {
        "shard-000000.index.jsonl",
        "shard-000000.tar",
        "samples.bin",
    }


def test_a_flipped_bit_of_the_table_is_named_with_its_key(out):
    flip(out / "samples.bin", 8 * (168 + 100))
    (found,) = problems(out)
    assert found.file == "samples.bin"
    assert found.key == "clip_1"


def test_the_reader_meets_no_damage_unnoticed(out):
    whole = {row: Dataset(out).read(row) for row in range(3)}
    rng = random.Random(1)

    def read_all():
        assert {row: Dataset(out).read(row) for row in range(3)} == whole

    for name in ("manifest.jsonl", "samples.bin", "shard-000000.tar", "shard-000001.tar"):
        data = (out / name).read_bytes()
        members = [m for s in read_index(out, name[:12]).samples for m in s.members] if ".tar" in name else []
        for _ in range(40):
            bit = rng.randrange(8 * len(data))
            flip(out / name, bit)
            if not members or any(m.offset <= bit // 8 < m.offset + m.size for m in members):
                with pytest.raises(ValueError, match=name):
                    read_all()
            else:  # a header or padding
                read_all()
            flip(out / name, bit)
        (out / name).unlink()
        with pytest.raises(ValueError, match=f"{name} is missing"):
            read_all()
        (out / name).write_bytes(data[: len(data) // 3])
        with pytest.raises(ValueError, match=name):
            read_all()
        (out / name).write_bytes(data)


def rewrite(out, changes, reindex=True):
    """Packs clip_0 again with other members, and makes indexes and manifest fit."""
    shard = "shard-000000"
    index = read_index(out, shard)
    dataset = Dataset(out)
    members = {**dataset.read(0), **changes}
    tar = io.BytesIO()
    facts = write_tar(tar, [("clip_0", {name: data for name, data in members.items() if data is not None})])
    (out / f"{shard}.tar").write_bytes(tar.getvalue())
    header = index.header.__class__(**{**vars(index.header), "tar_bytes": facts.bytes, "tar_sha256": facts.sha256})
    new = ShardIndex(header, facts.samples, index.rejects)
    if reindex:
        index_path(out, shard).write_bytes(index_bytes(new))
        write_dataset_files(out, dataset_files([new, read_index(out, "shard-000001")]))


def changed_info(out, **changes):
    return json.dumps({**json.loads(Dataset(out).read(0)["json"]), **changes}).encode()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("member", "make", "what", "fast"),
    [
        ("json", lambda out: changed_info(out, schema=2), "schema 2 is unknown", True),
        ("json", lambda out: changed_info(out, key="clip_1"), "it belongs to clip_1", True),
        ("json", lambda out: changed_info(out, frames=1), "32x48x1; here is clip_0, 32x48x5", True),
        ("json", lambda out: b"{", "is not JSON", True),
        ("camera.npy", lambda out: npy(np.zeros((4, 16))), r"float64 \[4, 16\]", True),
        ("camera.npy", lambda out: npy(np.full((5, 16), np.nan)), "finite float64", True),
        ("depth.geo", lambda out: Dataset(out).read(0)["points.geo"], "it holds .*'points'", True),
        ("depth.geo", lambda out: encode_depth(np.ones((4, 32, 48), "f4")).data, "it holds .* 4, 32, 48", True),
        ("points.geo", lambda out: b"GEO1", "truncated: 4 bytes", True),
        ("mp4", lambda out: b"#EXTM3U\n/etc/passwd\n", "cannot be decoded", False),
    ],
)
def test_members_that_fit_their_index_but_not_the_schema_are_named(out, member, make, what, fast):
    rewrite(out, {member: make(out)})
    for how in (True, False) if fast else (False,):
        found = [problem for problem in problems(out, how) if problem.key]
        assert [problem[:3] for problem in found] == [("shard-000000.tar", "clip_0", member)]
        assert re.search(what, found[0].what)


def test_a_chunk_that_does_not_decode_is_named(out):
    data = bytearray(Dataset(out).read(0)["depth.geo"])
    data[-3] ^= 255  # in the last frame's chunk
    rewrite(out, {"depth.geo": bytes(data)})
    assert problems(out, fast=True) == []
    (found,) = problems(out)
    assert found[:3] == ("shard-000000.tar", "clip_0", "depth.geo")
    assert "frame 4 " in found.what


def test_a_tar_that_is_not_the_one_of_its_index_is_named(out):
    rewrite(out, {"json": changed_info(out, caption="a different caption")}, reindex=False)
    for fast in (True, False):
        assert {problem.file for problem in problems(out, fast)} == {"shard-000000.tar"}


def test_a_tar_with_other_names_than_its_index_is_named(out):
    dataset = Dataset(out)
    tar = io.BytesIO()
    write_tar(tar, [("clip_1", dataset.read(1)), ("clip_7", dataset.read(2))])
    (out / "shard-000001.tar").write_bytes(tar.getvalue())
    found = problems(out, fast=True)
    assert found == [("shard-000001.tar", "clip_2", "camera.npy", "the tar and its index disagree about it")]


def test_sums_that_are_not_those_of_the_samples_are_named(out):
    first, *rest = unseal((out / "shard-000000.index.jsonl").read_bytes(), "index")
    first["totals"]["depth"]["raw_bytes"] += 1
    (out / "shard-000000.index.jsonl").write_bytes(seal([first, *rest]))
    found = problems(out, fast=True)
    assert ("shard-000000.index.jsonl", "its sums are not those of the samples") in [(p.file, p.what) for p in found]


def test_a_hash_that_is_not_the_tars_is_named(out):
    index = read_index(out, "shard-000000")
    header = index.header.__class__(**{**vars(index.header), "tar_sha256": "0" * 64})
    index_path(out, "shard-000000").write_bytes(index_bytes(index._replace(header=header)))
    write_dataset_files(out, dataset_files([read_index(out, f"shard-00000{i}") for i in range(2)]))
    (found,) = problems(out)
    assert found.file == "shard-000000.tar"
    assert f"instead of {'0' * 64}" in found.what


def test_shards_that_the_manifest_does_not_list_are_named(out):
    (out / "shard-000007.tar").write_bytes((out / "shard-000000.tar").read_bytes())
    found = {(problem.file, problem.what) for problem in problems(out)}
    assert ("shard-000007.tar", "is not in manifest.jsonl") in found


def test_nothing_to_verify_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        command(verify, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no shards; `fw data pack"):
        command(verify, tmp_path)


def test_a_dataset_without_samples_is_a_problem(tmp_path, capsys):
    raw = tmp_path / "raw"
    write_metadata(raw, [write_clip(raw, "bad")])
    os.unlink(raw / "videos/bad.mp4")
    assert command(pack, raw, tmp_path / "out", "--workers", 1) == 1
    assert command(verify, tmp_path / "out", "--workers", 1) == 1
    assert "the dataset holds no samples" in capsys.readouterr().out
