"""What a loader does with data that is damaged, missing, or not what it needs."""

import logging
import math
import os
import random
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from packed_clips import damage_member, make_packed, marked_tensor, pack_arguments
from raw_clips import clip_labels, write_clip, write_metadata
from sidecars import make_sidecar, noise_facts

from data_tools import pack
from fw_train.atomic_files import write_file
from fw_train.data import samples
from fw_train.data.codec import encode_depth
from fw_train.data.expand import expand_labels
from fw_train.data.fetch import TooManyUnreadable, substitute_row
from fw_train.data.loader import LoaderParams, SourceParams, TrainingData, expand_batch, expand_video
from fw_train.data.manifest import (
    Dataset,
    ShardIndex,
    dataset_files,
    index_bytes,
    index_path,
    read_index,
    write_dataset_files,
)
from fw_train.data.quarantine import QuarantineEntry, write_quarantine
from fw_train.data.shards import shard_path, write_tar
from fw_train.data.sidecar import read_empty_text

SIZES = (32, 48), (48, 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_packed(tmp_path_factory.mktemp("faults"), ((5, 32, 48, 5), (1, 48, 32, 5)), shard_size=3)


@pytest.fixture
def out(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def params(**changes):
    given = {"frames": 5, "sizes_px": SIZES, "latents": "sidecar", "members": ("latent", "text"), "video": True}
    return LoaderParams(**{**given, "text_tokens": 4, "workers": 0, "timeout_s": 60, **changes})


def open_data(*folders, **changes):
    return TrainingData([SourceParams(str(folder)) for folder in folders], params(**changes), 0)


def numbers(data, stream, row):
    """Everything that a step would see of a row, or None where it is detected to be unreadable."""
    coded = data.sample_batch(0, [int(row)], [0])
    if coded.substituted:
        assert coded.substituted[0].reason
        return None
    batch = expand_batch(coded, "cpu", torch.float32)
    fields = batch.latents, batch.text, batch.depth, batch.valid, batch.points, batch.pose9, expand_video(coded, "cpu")
    return [coded.keys, coded.captions, *(tensor.numpy().tobytes() for tensor in fields)]


def read_all(folder):
    """By row; an exception where the data cannot be opened at all."""
    data = open_data(folder)
    found = {int(row): numbers(data, stream, row) for stream in range(len(data.streams)) for row in data.rows(stream)}
    return {**found, "empty": read_empty_text(data.sources[0].dataset).float().numpy().tobytes()}


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def remove(path, rng):
    path.unlink()


def test_no_damage_of_any_file_lets_a_wrong_number_through(made, out):
    whole = read_all(made)
    assert None not in whole.values()
    rng = random.Random(0)
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".tar", ".jsonl", ".bin", ".safetensors"}
    undetected = set()
    for name in files:
        for damage in (truncate, flip, remove):
            if not (made / name).stat().st_size:
                continue
            damage(out / name, rng)
            try:
                found = read_all(out)
            except (ValueError, TooManyUnreadable):
                found = {}
            for row, seen in found.items():
                assert seen in (None, whole[row]), (name, damage.__name__, row)
            if found == whole:
                undetected.add((name.name, damage.__name__))
            shutil.copyfile(made / name, out / name)
    # A loader reads no index and no list of rejects; the rest of a tar, behind its last member, is nobody's.
    missed = {name for name in undetected if not (name[0] == "rejects.jsonl" or name[0].endswith(".index.jsonl"))}
    assert all(name.endswith(".tar") and damage != "remove" for name, damage in missed), missed


def test_a_corrupt_sample_is_replaced_by_the_same_one_everywhere(out, caplog):
    damage_member(out, "a3")
    expected = {}
    for world, micro_batch, workers in ((1, 4, 0), (2, 1, 0), (1, 2, 2)):
        found, named = {}, set()
        for rank in range(world):
            data = open_data(out, workers=workers)
            with caplog.at_level(logging.WARNING):
                for batch in data.batches([(0, 4)], 0, 8, rank=rank, world=world, micro_batch=micro_batch):
                    found |= dict(zip(batch.positions, batch.keys, strict=True))
                    named |= {key for key, _ in batch.substituted}
                    assert all("depth.geo is damaged: CRC" in reason for _, reason in batch.substituted)
        expected = expected or found
        assert found == expected
        assert named == {"a3"}
    assert "a3" not in expected.values()
    assert "sample a3 cannot be read" in caplog.text
    assert "quarantine.jsonl" in caplog.text


def test_substitutes_are_of_the_same_stream_and_differ_by_position(out):
    write_quarantine(out, [QuarantineEntry("a1", "manual", "")])
    data = open_data(out)
    stream = data._rows[0]
    rows = [substitute_row(stream, 0, position, 0) for position in range(200)]
    assert set(rows) == set(data.rows(0).tolist()) == {0, 2, 3, 4}
    assert rows != [substitute_row(stream, 1, position, 0) for position in range(200)]
    assert rows != [substitute_row(stream, 0, position, 1) for position in range(200)]


def test_data_that_is_gone_stops_the_run(out):
    data = open_data(out)
    for shard in out.glob("*.tar"):
        shard.unlink()
    with pytest.raises(
        TooManyUnreadable, match=r"7 substitutes from .*out cannot be read; .*a1: .*shard-000000.tar is missing"
    ):
        data.sample_batch(0, [1], [0])
    batches = open_data(out, workers=1).batches([(0, 4)], 0, 1, rank=0, world=1, micro_batch=4)
    with pytest.raises(TooManyUnreadable):
        next(batches)


def forge(out, key, **members):
    """Writes the dataset again with other members for a key, named with _ for the dot; its check sums are right."""
    dataset = Dataset(out)
    indexes = []
    for line in dataset.manifest.shards:
        contents = [
            (dataset.sample(row).key, dataset.read(row)) for row in range(line.first, line.first + line.totals.samples)
        ]
        for name, data in contents:
            if name == key:
                data.update({suffix.replace("_", "."): member for suffix, member in members.items()})
        with open(shard_path(out, line.shard), "wb") as file:
            tar = write_tar(file, contents)
        old = read_index(out, line.shard)
        index = ShardIndex(replace(old.header, tar_bytes=tar.bytes, tar_sha256=tar.sha256), tar.samples, old.rejects)
        write_file(index_path(out, line.shard), index_bytes(index))
        indexes.append(index)
    write_dataset_files(out, dataset_files(indexes))
    return Dataset(out)


ONLINE = {"latents": "online", "members": ()}


def test_members_that_do_not_belong_to_the_sample_are_refused(made, tmp_path):
    dataset = Dataset(made)
    other, same = dataset.read(dataset.find("b0")), dataset.read(dataset.find("a2"))
    short = encode_depth(np.ones((4, 32, 48), np.float32)).data
    cases = {
        r"depth.geo is depth 48x32x5; depth 32x48x5 is needed": {"depth_geo": other["depth.geo"]},
        r"depth.geo is points 32x48x5; depth": {"depth_geo": same["points.geo"]},
        r"depth.geo is depth 32x48x4": {"depth_geo": short},
        r"belongs to a2, 32x48x5; here is a1": {"json": same["json"]},
        r"mp4 gives \[5, 48, 32\]; \[5, 32, 48\] is needed": {"mp4": other["mp4"]},
        r"camera.npy is no npy file": {"camera_npy": b"1 2 3"},
        r"cannot be decoded after 0 of the 5 frames": {"mp4": b"no video"},
    }
    for number, (reason, members) in enumerate(cases.items()):
        out = tmp_path / str(number)
        shutil.copytree(made, out)
        forge(out, "a1", **members)
        coded = open_data(out, **ONLINE).sample_batch(0, [1], [0])
        ((key, found),) = coded.substituted
        assert key == "a1"
        assert re.search(reason, found)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_lossless_labels_that_are_no_depth_are_refused(made, monkeypatch, value):
    whole = samples.decode_codes

    def decode_wrongly(*words):
        codes = whole(*words)
        if codes.kind == "points":
            return codes
        exact = np.ones((5, 1, 32, 48), np.float32)
        exact[2, 0, 7, 9] = value
        nothing = {"lossy": codes.lossy[:0], "deltas": codes.deltas[:0], "parameters": codes.parameters[:0]}
        seen = np.ones((5, 32, 48), bool)
        seen[3:] = False
        return codes._replace(**nothing, lossless=np.arange(5), exact=exact, exact_valid=seen)

    monkeypatch.setattr(samples, "decode_codes", decode_wrongly)
    with pytest.raises(TooManyUnreadable, match="depth.geo has valid pixels that are NaN, infinite or not in front"):
        open_data(made, **ONLINE).sample_batch(0, [0], [0])


def test_pixels_without_labels_are_zero_and_leave_the_scale_alone(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    depth, points, _ = clip_labels()
    seen = np.ones(depth.shape, bool)
    seen[1:, :, :24] = False
    hidden = np.where(seen, depth, np.float32(np.nan))
    for preset in ("default", "lossless"):
        forge(tmp_path / "out", "a0", depth_geo=encode_depth(hidden, preset=preset).data)
        coded = open_data(tmp_path / "out", **ONLINE).sample_batch(0, [0], [0])
        labels = expand_labels(coded.samples[0].labels, coded.samples[0].view, 99.0, "cpu")
        assert np.array_equal(labels.valid.numpy(), seen)
        assert not labels.depth[~labels.valid].any()
        assert not labels.points.movedim(1, -1)[~labels.valid].any()
        scale = np.linalg.norm(points[seen].astype(np.float64), axis=-1).mean()
        assert labels.depth[0, 0, 0].item() * scale == pytest.approx(depth[0, 0, 0], rel=1e-3)


def test_a_window_without_labels_takes_the_scale_of_the_packed_clip(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    depth, _, _ = clip_labels()
    seen = np.zeros(depth.shape, bool)
    seen[:, :, :2] = True
    forge(tmp_path / "out", "a0", depth_geo=encode_depth(depth, seen).data)
    coded = open_data(tmp_path / "out", sizes_px=((32, 32),), **ONLINE).sample_batch(0, [0], [0])
    labels = expand_labels(coded.samples[0].labels, coded.samples[0].view, 4.0, "cpu")
    assert not labels.valid.any()
    assert not labels.depth.any()
    assert labels.first_from_cam[1, 0, 3].item() == pytest.approx(0.1 / 4)


def test_quarantined_samples_are_never_drawn_and_change_the_fingerprint(out, caplog):
    before = open_data(out)
    write_quarantine(out, [QuarantineEntry(key, "manual", "") for key in ("a0", "a3", "b0", "gone")])
    data = open_data(out)
    assert "1 of its 4 keys are not in the dataset" in caplog.text
    assert "out/48x32x5: all 1 clips are in quarantine" in caplog.text
    assert [(stream.name, stream.size) for stream in data.streams] == [("out/32x48x5", 3)]
    assert data.rows(0).tolist() == [1, 2, 4]
    keys = {key for batch in data.batches([(0, 3)], 0, 6, rank=0, world=1, micro_batch=3) for key in batch.keys}
    assert keys == {"a1", "a2", "a4"}
    assert data.fingerprint != before.fingerprint
    assert data.facts["sources"]["out"]["quarantined"] == 3
    with pytest.raises(ValueError, match="not in one stream"):
        data.sample_batch(0, [3], [0])


@pytest.mark.parametrize("text", ['{"key": "a1", "fau', '{"key": "a1"}\n', "\0" * 8])
def test_a_quarantine_list_that_cannot_be_read_is_refused(out, text):
    (out / "quarantine.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"quarantine\.jsonl, line 1"):
        open_data(out)


def test_the_fingerprint_follows_what_is_trained_on(made, out):
    first = open_data(out)
    assert open_data(out).fingerprint == first.fingerprint
    assert open_data(out, workers=2, video=False).fingerprint == first.fingerprint
    assert open_data(out, members=("latent",)).fingerprint != first.fingerprint
    weighted = TrainingData([SourceParams(str(out), weight=2.0)], params(), 0)
    assert weighted.fingerprint != first.fingerprint
    make_sidecar(Dataset(out), "text", noise_facts("text", encoder="another"), marked_tensor)
    assert open_data(out).fingerprint != first.fingerprint
    forge(out, "a0", json=Dataset(out).read(0)["json"].replace(b"wall", b"hall"))
    assert open_data(out, **ONLINE).fingerprint != open_data(made, **ONLINE).fingerprint


def test_sources_share_their_weight_by_size_and_need_one_encoder(made, out):
    names = [SourceParams(str(made), 3.0, "one"), SourceParams(str(out), 1.0, "two")]
    data = TrainingData(names, params(), 0)
    assert [(s.name, s.weight) for s in data.streams] == [
        ("one/32x48x5", 2.5),
        ("one/48x32x5", 0.5),
        ("two/32x48x5", pytest.approx(5 / 6)),
        ("two/48x32x5", pytest.approx(1 / 6)),
    ]
    assert [data.source_of(stream) for stream in range(4)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="more than once"):
        list(open_data(made, out).batches([(0, 4)], 0, 1, rank=0, world=1, micro_batch=4))
    make_sidecar(Dataset(out), "text", noise_facts("text", encoder="another"), marked_tensor)
    with pytest.raises(ValueError, match=r"were not made alike \(encoder: 'another' there, 'noise' here\)"):
        TrainingData(names, params(), 0)


def test_latents_of_another_size_or_length_are_refused(made, out):
    assert open_data(made, frames=1).streams
    with pytest.raises(ValueError, match=r"encoded at 32x48 .* trains at 32x64; run `fw data encode .*32x64"):
        open_data(made, sizes_px=((32, 64), (48, 32)))
    make_sidecar(Dataset(out), "latent", noise_facts("latent", frames=1), lambda kind, row, _: torch.zeros(16, 1, 4, 6))
    with pytest.raises(ValueError, match="encoded to 1 latent frames, 5 frames need 2; run `fw data encode --frames 5"):
        open_data(out)


def test_clips_that_are_too_short_are_left_out(tmp_path, caplog):
    out = make_packed(tmp_path, ((2, 32, 48, 5), (2, 32, 48, 9)), kinds=())
    data = open_data(out, frames=9, **ONLINE)
    assert [stream.name for stream in data.streams] == ["out/32x48x9"]
    assert "out/32x48x5: its 2 clips are shorter than 9 frames and left out" in caplog.text
    with pytest.raises(ValueError, match="no clip of out has the 13 frames"):
        open_data(out, frames=13, **ONLINE)


def test_a_dataset_without_samples_is_an_error(tmp_path):
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_metadata(raw, [write_clip(raw, "bad")])
    (raw / "videos/bad.mp4").unlink()
    pack.run(pack_arguments(raw, out))
    with pytest.raises(ValueError, match="holds no samples: all 1 clips are in"):
        open_data(out, **ONLINE)
    with pytest.raises(ValueError, match="there is no dataset to train on"):
        open_data(**ONLINE)


def test_one_shard_serves_many_ranks(tmp_path):
    out = make_packed(tmp_path, ((3, 32, 48, 5),), shard_size=10, kinds=())
    found = [
        key
        for rank in range(6)
        for batch in open_data(out, **ONLINE).batches([(0, 6)], 0, 1, rank=rank, world=6, micro_batch=1)
        for key in batch.keys
    ]
    assert sorted(found) == ["a0", "a0", "a1", "a1", "a2", "a2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 6}, "6 frames are not 4k \\+ 1"),
        ({"sizes_px": ((33, 48),)}, "33x48 pixels .* are not multiples of 16"),
        ({"sizes_px": ()}, "sizes_px is empty"),
        ({"members": ("latent", "sound")}, r"\['sound'\] are no kinds of sidecars"),
        ({"members": ("text",)}, "contradict each other"),
        ({"latents": "online"}, "contradict each other"),
        ({"workers": -1}, "workers -1 must be at least 0"),
        ({"prefetch": 0}, "prefetch 0"),
        ({"members": ("latent", "clip")}, "clip is missing: no sidecar.jsonl"),
    ],
)
def test_impossible_settings_are_refused_at_once(made, changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(made, **changes)


def test_a_world_that_does_not_fit_is_refused_before_anything_is_read(made):
    with pytest.raises(ValueError, match="global_batch 6 is not divisible by world 4"):
        open_data(made).batches([(0, 4), (10, 6)], 0, 20, rank=0, world=4, micro_batch=1)


def test_texts_that_are_longer_than_the_network_takes_are_refused(out):
    data = open_data(out, text_tokens=3)
    assert not data.sample_batch(0, [1], [0]).substituted
    make_sidecar(Dataset(out), "text", tensor=lambda kind, row, _: torch.zeros(4 if row == 1 else 2, 8))
    with pytest.raises(ValueError, match=r"text: the text of a1 has 4 tokens, data.text_tokens is 3; raise that"):
        open_data(out, text_tokens=3)
    (out / "quarantine.jsonl").write_text('{"key": "a1", "fault": "manual", "detail": "wordy"}\n')
    open_data(out, text_tokens=3)
    with pytest.raises(ValueError, match="has 2 tokens, data.text_tokens is 1"):
        open_data(out, text_tokens=1)
