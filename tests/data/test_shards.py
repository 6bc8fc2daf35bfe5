import hashlib
import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fw_train.atomic_files import write_file
from fw_train.data.manifest import (
    ROW,
    Dataset,
    IndexHeader,
    Rejected,
    Settings,
    ShardIndex,
    Totals,
    dataset_files,
    index_bytes,
    index_path,
    read_index,
    read_manifest,
    seal,
    unseal,
    write_dataset_files,
)
from fw_train.data.schema import SUFFIXES
from fw_train.data.shards import (
    Entry,
    Member,
    ShardError,
    ShardFiles,
    header_block,
    scan_tar,
    shard_path,
    sort_key,
    write_tar,
)


def members(seed=0, size=700):
    rng = np.random.default_rng(seed)
    return {suffix: rng.bytes(size + i) for i, suffix in enumerate(SUFFIXES)}


def make_tar(path, keys=("a-b", "a", "b"), **more):
    with open(path, "wb") as file:
        return write_tar(file, [(key, members(i, **more)) for i, key in enumerate(keys)])


def make_dataset(folder, shards=(("a-b", "a"), ("b",)), buckets=("32x48x5", "64x64x5")):
    """A dataset whose members are noise."""
    indexes = []
    for number, (keys, bucket) in enumerate(zip(shards, buckets, strict=True)):
        name = f"shard-{number:06}"
        tar = make_tar(folder / f"{name}.tar", keys)
        rejects = (Rejected(f"bad_{number}", "a\nreason"),)
        settings = Settings("default", None, 128)
        facts = (1, name, bucket, "plan", settings, tar.bytes, tar.sha256, len(rejects), Totals(samples=len(keys)))
        index = ShardIndex(IndexHeader(*facts), tar.samples, rejects)
        write_file(index_path(folder, name), index_bytes(index))
        indexes.append(index)
    write_dataset_files(folder, dataset_files(indexes))
    return indexes


def test_a_shard_is_a_plain_tar_of_fixed_bytes(tmp_path):
    facts = make_tar(tmp_path / "shard-000000.tar")
    data = (tmp_path / "shard-000000.tar").read_bytes()
    assert facts.bytes == len(data)
    assert facts.sha256 == hashlib.sha256(data).hexdigest()
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        files = tar.getmembers()
        names = [file.name for file in files]
        assert names == sorted(f"{key}.{suffix}" for key in ("a", "a-b", "b") for suffix in SUFFIXES)
        assert {(f.mtime, f.uid, f.gid, f.uname, f.gname, f.mode, f.type) for f in files} == {
            (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
        }
        assert tar.extractfile("a.json").read() == members(1)["json"]
    entries = scan_tar(tmp_path / "shard-000000.tar")
    assert entries == [Entry(s.key, m.suffix, m.offset, m.size) for s in facts.samples for m in s.members]
    for sample in facts.samples:
        for member in sample.members:
            assert len(data[member.offset : member.offset + member.size]) == member.size


def test_the_bytes_of_a_shard_are_known():
    file = io.BytesIO()
    facts = write_tar(file, [("key", {"json": b"{}", "mp4": b"video"})])
    assert facts.bytes == 4 * 512 + 1024
    assert facts.sha256 == "4837a292ed23aeea6f42126365acc5d6c01abbb24a9b16986f3fdefa2b2c8392"
    assert facts.samples[0].members == (Member("json", 512, 2, 2745614147), Member("mp4", 1536, 5, 2093472300))


def test_keys_sort_as_the_names_of_their_members():
    keys = ["a", "a-b", "a0", "aB", "a_b", "ab", "b"]
    assert sorted(keys, key=sort_key) == [name[:-5] for name in sorted(f"{key}.json" for key in keys)]
    with pytest.raises(ShardError, match="sample a-b comes after a; keys ascend"):
        write_tar(io.BytesIO(), [("a", members()), ("a-b", members())])
    with pytest.raises(ShardError, match="sample a comes after a"):
        write_tar(io.BytesIO(), [("a", members()), ("a", members())])


def tar_of(*files, format=tarfile.USTAR_FORMAT):
    """A tar of (name, changes of its header) with five bytes each."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, changes in files:
            facts = tarfile.TarInfo(name)
            facts.size = 5
            for attribute, value in changes.items():
                setattr(facts, attribute, value)
            tar.addfile(facts, io.BytesIO(b"12345"))
    data = file.getvalue()
    end = len(data.rstrip(b"\0"))
    return data[: -(-end // 512) * 512] + bytes(1024)


LINK = {"linkname": "/etc/passwd", "size": 0}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("../a.json", {})], "'../a.json' points out of the folder"),
        ([("x/../../a.json", {})], "points out of the folder"),
        ([("/tmp/a.json", {})], "'/tmp/a.json' is an absolute name"),
        ([("x/a.json", {})], "'x/a.json' is no member"),
        ([("a.json", {"type": tarfile.SYMTYPE, **LINK})], "is a symbolic link"),
        ([("a.json", {"type": tarfile.LNKTYPE, **LINK})], "is a hard link"),
        ([("a.json", {"type": tarfile.CHRTYPE, "size": 0})], "is a device"),
        ([("a.json", {"type": tarfile.BLKTYPE, "size": 0})], "is a device"),
        ([("a.json", {"type": tarfile.FIFOTYPE, "size": 0})], "is a pipe"),
        ([("a.json", {"type": tarfile.DIRTYPE, "size": 0})], "is a folder"),
        ([("a.json", {}), ("a.json", {})], "a.json is there twice"),
        ([("a.json", {}), ("a.mp4", {}), ("a.json", {})], "a.json comes after a.mp4"),
        ([("a.mp4", {}), ("a.json", {})], "a.json comes after a.mp4"),
        ([("a.b.json", {})], r"'a.b.json' is no member; .*\(no dots\)"),
        ([("a.pickle", {})], "'a.pickle' is no member"),
        ([("a", {})], "'a' is no member"),
        ([(".json", {})], "'.json' is no member"),
        ([("a.json", {"mtime": 7})], "not one of this format"),
        ([("a.json", {"uname": "root"})], "not one of this format"),
    ],
)
def test_crafted_tars_are_refused(tmp_path, files, message):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "shard-000000.tar"
    path.write_bytes(tar_of(*files))
    with pytest.raises(ShardError, match=message):
        scan_tar(path)
    assert [p.name for p in tmp_path.rglob("*")] == ["inside", path.name]


def test_extended_headers_are_refused(tmp_path):
    path = tmp_path / "shard-000000.tar"
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path.write_bytes(tar_of(("x" * 120 + ".json", {}), format=kind))
        with pytest.raises(ShardError, match="not one of this format"):
            scan_tar(path)


def test_broken_tars_are_refused(tmp_path):
    path = tmp_path / "shard-000000.tar"
    good = tar_of(("a.json", {}), ("a.mp4", {}))
    path.write_bytes(good)
    assert len(scan_tar(path)) == 2
    huge = bytearray(header_block("a.mp4", 5))
    huge[124:136] = bytes([128, 0, 0, 0, 127, 255, 255, 255, 255, 255, 255, 255])  # a size in base 256
    huge[148:156] = b" " * 8
    huge[148:156] = b"%06o\0 " % sum(huge)
    for data, message in (
        (b"", "is truncated: it ends at byte 0"),
        (good[:600], "a.json ends at byte 1024 of 600"),
        (good[:1024], "truncated: it ends at byte 1024 without the end mark"),
        (good[:-512], "512 bytes behind the last member"),
        (good + bytes(512), "1536 bytes behind the last member"),
        (good + good, "bytes behind the last member"),
        (good[:520] + b"x" + good[521:], "the padding behind a.json is not zero"),
        (good[:3] + b"x" + good[4:], "the tar header at byte 0 is damaged"),
        (b"pipe: cat /etc/passwd" + bytes(1024), "the tar header at byte 0 is damaged"),
        (bytes(huge) + good[512:], "not one of this format"),
    ):
        path.write_bytes(data)
        with pytest.raises(ShardError, match=message):
            scan_tar(path)


def test_shard_names_are_no_paths():
    assert shard_path(Path("x"), "shard-000012") == Path("x/shard-000012.tar")
    for name in ("../shard-000000", "pipe:touch x", "/etc/passwd", "shard-1", "shard-000000\n", ""):
        with pytest.raises(ShardError, match="is no shard name"):
            shard_path(Path("x"), name)


def test_members_are_read_by_position(tmp_path):
    facts = make_tar(tmp_path / "shard-000000.tar")
    files = ShardFiles(tmp_path)
    for i, sample in ((0, facts.samples[0]), (2, facts.samples[2]), (1, facts.samples[1])):
        for member in sample.members:
            assert files.read("shard-000000", sample.key, member) == members(i)[member.suffix]
    key, member = facts.samples[1].key, facts.samples[1].members[2]
    with pytest.raises(ShardError, match="shard-000000.tar: a.json is damaged: CRC [0-9a-f]{8} instead of"):
        files.read("shard-000000", key, member._replace(offset=member.offset + 1))
    with pytest.raises(ShardError, match="a.json ends at byte .* the shard is truncated"):
        files.read("shard-000000", key, member._replace(offset=facts.bytes - 4))
    with pytest.raises(ShardError, match="shard-000009.tar is missing"):
        files.read("shard-000009", key, member)


def test_readers_are_copied_without_their_open_files(tmp_path):
    make_dataset(tmp_path)
    dataset = Dataset(tmp_path)
    first = dataset.read(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 500
    dataset.close()
    assert copy.read(0) == first == dataset.read(0)


def test_copies_take_over_what_was_checked_and_read_no_manifest(tmp_path):
    make_dataset(tmp_path)
    dataset = Dataset(tmp_path)
    data, manifest = pickle.dumps(dataset), dataset.manifest
    (tmp_path / "manifest.jsonl").rename(tmp_path / "aside")
    copy = pickle.loads(data)
    assert [copy.sample(row) for row in range(3)] == [dataset.sample(row) for row in range(3)]
    assert copy.buckets == manifest.buckets
    (tmp_path / "aside").rename(tmp_path / "manifest.jsonl")
    assert copy.manifest == manifest


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("fw_train.data.shards.MAX_OPEN", 2)
    for number in range(4):
        facts = make_tar(tmp_path / f"shard-{number:06}.tar")
    files = ShardFiles(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in (0, 1, 2, 3, 1, 3):
        files.read(f"shard-{number:06}", "a", facts.samples[1].members[0])
        assert len(os.listdir("/proc/self/fd")) - before <= 2
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_seal_breaks_with_any_bit():
    lines = [{"a": 1, "text": "two\nlines \u2028 and a caf\u00e9"}, {"b": [1, 2]}]
    data = seal(lines)
    assert unseal(data, "x") == lines
    for bit in range(8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="x is damaged"):
            unseal(bytes(broken), "x")
    for length in range(len(data)):
        with pytest.raises(ValueError, match="x is damaged"):
            unseal(data[:length], "x")


def test_an_index_comes_back(tmp_path):
    indexes = make_dataset(tmp_path)
    assert read_index(tmp_path, "shard-000001") == indexes[1]
    (tmp_path / "shard-000005.index.jsonl").write_bytes((tmp_path / "shard-000001.index.jsonl").read_bytes())
    with pytest.raises(ShardError, match="is the index of 'shard-000001'"):
        read_index(tmp_path, "shard-000005")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[0].update(schema=2), "schema 2 is unknown"),
        (lambda lines: lines[0].update(more=1), "an unknown 'more'"),
        (lambda lines: lines[0].update(shard="../x"), "is the index of '../x'"),
        (lambda lines: lines[0].update(bucket="big"), "'big' is no bucket"),
        (lambda lines: lines[1]["members"].pop("mp4"), "line 2 is not a key with the members"),
        (lambda lines: lines[1]["members"].update(mp4=[1, -2, 3]), "line 2 is not a key with the members"),
        (lambda lines: lines[1]["members"].update(mp4=[1, 2]), "line 2 is not a key with the members"),
        (lambda lines: lines.insert(1, lines[1]), "its keys do not ascend"),
        (lambda lines: lines.pop(2), "1 samples and 1 rejects are not what its first line says"),
        (lambda lines: lines.append({}), "are not what its first line says"),
        (lambda lines: lines[3].update(id=3), "is not a rejected clip"),
    ],
)
def test_indexes_that_are_refused(tmp_path, change, message):
    make_dataset(tmp_path)
    path = tmp_path / "shard-000000.index.jsonl"
    lines = unseal(path.read_bytes(), "x")
    change(lines)
    path.write_bytes(seal(lines))
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path, "shard-000000")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[0].update(schema=0), "schema 0 is unknown"),
        (lambda lines: lines[0].update(samples=4), "does not fit the 2 shards with 3 samples"),
        (lambda lines: lines[0].update(members="json mp4"), "does not fit"),
        (lambda lines: lines[1].update(shard="../../x"), "the line of shard '../../x' is impossible"),
        (lambda lines: lines[1].update(shard="pipe:x"), "the line of shard 'pipe:x' is impossible"),
        (lambda lines: lines[2].update(shard="shard-000000"), "a shard is listed twice"),
        (lambda lines: lines[2].update(first=1), "is impossible"),
        (lambda lines: lines.pop(), "does not fit"),
    ],
)
def test_manifests_that_are_refused(tmp_path, change, message):
    make_dataset(tmp_path)
    path = tmp_path / "manifest.jsonl"
    lines = unseal(path.read_bytes(), "x")
    change(lines)
    path.write_bytes(seal(lines))
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


def test_a_dataset_is_read_by_row(tmp_path):
    make_dataset(tmp_path)
    dataset = Dataset(tmp_path)
    assert len(dataset) == 3
    assert [dataset.sample(row).key for row in range(3)] == ["a-b", "a", "b"]
    assert [(rows.bucket, rows.first, rows.samples) for rows in dataset.buckets] == [
        ("32x48x5", 0, 2),
        ("64x64x5", 2, 1),
    ]
    assert dataset.read(1) == members(1)
    assert dataset.read(2, ["json"]) == {"json": members(0)["json"]}
    assert dataset.find("b") == 2
    with pytest.raises(ShardError, match="has no sample 'c'"):
        dataset.find("c")
    for row in (-1, 3):
        with pytest.raises(IndexError, match="which has rows 0 to 2"):
            dataset.sample(row)
    assert (tmp_path / "rejects.jsonl").read_text().count("\n") == 2


def test_every_bit_of_a_row_is_guarded(tmp_path):
    make_dataset(tmp_path)
    data = (tmp_path / "samples.bin").read_bytes()
    for bit in range(8 * ROW.itemsize, 8 * 2 * ROW.itemsize, 7):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        (tmp_path / "samples.bin").write_bytes(broken)
        dataset = Dataset(tmp_path)
        dataset.sample(0)
        with pytest.raises(ShardError, match="samples.bin, row 1 is damaged"):
            dataset.sample(1)
    (tmp_path / "samples.bin").write_bytes(data[:-1])
    with pytest.raises(ShardError, match="503 bytes; 3 samples need 504"):
        Dataset(tmp_path)


def test_a_key_in_two_shards_is_refused(tmp_path):
    with pytest.raises(ShardError, match="key a is in two shards"):
        make_dataset(tmp_path, shards=(("a",), ("a", "b")))


def test_opening_a_table_of_many_samples_reads_none_of_them(tmp_path):
    """A table of a million rows, all holes: what is read is not mapped, and a hole is no valid row."""
    first, *rest = unseal((make_dataset(tmp_path), (tmp_path / "manifest.jsonl").read_bytes())[1], "x")
    first["samples"] += 1_000_000
    rest[-1]["totals"]["samples"] += 1_000_000
    (tmp_path / "manifest.jsonl").write_bytes(seal([first, *rest]))
    os.truncate(tmp_path / "samples.bin", 1_000_003 * ROW.itemsize)
    dataset = Dataset(tmp_path)
    assert len(dataset) == 1_000_003
    tracemalloc.start()
    assert dataset.find_all(["b", "not there", "a-b"]).tolist() == [0, 2]
    assert tracemalloc.get_traced_memory()[1] < 8e6, "a copy of many keys"
    tracemalloc.stop()
    assert dataset.read(1) == members(1)
    with pytest.raises(ShardError, match="row 1000002 is damaged"):
        dataset.sample(1_000_002)
    assert "samples.bin" not in Path("/proc/self/maps").read_text()
