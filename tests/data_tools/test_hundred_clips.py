"""The whole way of a hundred synthetic clips: made, packed, encoded, verified, audited, read by the loader; packing killed."""

import json
import os
import sys
import time

import numpy as np
import pytest
import torch
from killed_packing import exit_code, finished_shards, kill_often
from raw_clips import contents

from data_tools.audit import NUMBERS
from fw_train.camera_files import read_cameras
from fw_train.cli import main
from fw_train.data.codec import PRECISION
from fw_train.data.codec_torch import expand
from fw_train.data.loader import LoaderParams, SourceParams, TrainingData, expand_batch
from fw_train.geometry import relative_to_first

CLIPS, FRAMES, HEIGHT, WIDTH = 100, 9, 64, 96
BOUND = PRECISION["default"].bound

pytestmark = pytest.mark.slow


def fw(*words):
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hundred") / "raw"
    fw("data", "synth", folder, "--scenes", CLIPS, "--frames", FRAMES, "--size", f"{HEIGHT}x{WIDTH}", "--workers", 1)
    return folder


@pytest.fixture(scope="module")
def packed(raw):
    folder = raw.with_name("packed")
    fw("data", "pack", raw, folder, "--shard-size", 8, "--workers", 1)
    fw("data", "encode", folder, "--codec", "dct", "--text", "hash:16", "--workers", 1)
    return folder


def raw_labels(raw, kind, key):
    """Labels [T, H, W, ...] of a clip, and where all of their numbers are finite."""
    labels = np.stack([np.load(raw / kind / key / f"frame_{t:04}.npy") for t in range(FRAMES)])
    return labels, np.isfinite(labels.reshape(FRAMES, HEIGHT, WIDTH, -1)).all(axis=-1)


def test_verification_and_audit_find_nothing(packed, capsys):
    fw("data", "verify", packed, "--workers", 1)
    assert (
        f"{CLIPS} samples in 13 shards, encoded in 2 folders beside them; everything is in order"
        in capsys.readouterr().out
    )
    fw("data", "audit", packed, "--workers", 1)
    assert f"{CLIPS} clips, 0 with faults, 0 with warnings, 0 in quarantine" in capsys.readouterr().out
    lines = [json.loads(line) for line in (packed / NUMBERS).read_text().splitlines()]
    assert len(lines) == CLIPS
    assert all(line["findings"] == [] for line in lines)


def test_a_pass_of_the_loader_gives_every_clip_once_with_the_labels_that_were_rendered(raw, packed):
    params = LoaderParams(FRAMES, ((HEIGHT, WIDTH),), "sidecar", ("latent", "text"), text_tokens=64)
    captions = {entry["id"]: entry["caption"] for entry in json.loads((raw / "metadata.json").read_text())}
    data, seen = TrainingData([SourceParams(str(packed))], params, seed=3), list[str]()
    for coded in data.batches([(0, 10)], 0, CLIPS // 10, rank=0, world=1, micro_batch=5):
        assert coded.substituted == ()
        batch = expand_batch(coded, "cpu", torch.float32)
        assert batch.latents.shape == (5, 16, 3, HEIGHT // 8, WIDTH // 8)
        assert batch.latents.isfinite().all()
        assert batch.text.shape == (5, 64, 16)
        for number, sample in enumerate(coded.samples):
            seen.append(sample.key)
            assert sample.caption == captions[sample.key]
            scene = (
                batch.depth[number].numpy(),
                batch.points[number].movedim(1, -1).numpy(),
                batch.valid[number].numpy(),
            )
            check_labels(raw, sample, scene)
    assert sorted(seen) == sorted(captions)
    assert len(seen) == CLIPS


def check_labels(raw, sample, scene):
    """Compares depth, points and cameras with the files they come from, decoded and as the scene's units have them."""
    depth, depth_valid = raw_labels(raw, "depth", sample.key)
    points, points_valid = raw_labels(raw, "points", sample.key)
    cameras = read_cameras(raw / "camera_params" / f"{sample.key}.txt")
    assert torch.equal(sample.labels.cameras.cam_from_world, cameras.cam_from_world)
    assert torch.equal(sample.labels.cameras.intrinsics_frac, cameras.intrinsics_frac)

    valid = depth_valid & points_valid
    assert np.array_equal(scene[2], valid)
    centres = relative_to_first(cameras.cam_from_world)[:, None, None, :3, 3].numpy()
    found, found_valid = expand(sample.labels.depth, "cpu")
    assert np.array_equal(found_valid.numpy(), depth_valid)
    assert (np.abs(found.numpy() - depth)[valid] <= BOUND["depth"] * depth[valid]).all()
    found, found_valid = expand(sample.labels.points, "cpu")
    assert np.array_equal(found_valid.numpy(), points_valid)
    # The bound is of the distance to the camera that the codec fits: the frame's own, but for rounding.
    distance, error = (
        np.linalg.norm(p, axis=-1)[valid] for p in (points - centres, found.movedim(1, -1).numpy() - points)
    )
    assert (error <= 1.001 * BOUND["points"] * distance).all()

    # One number scales a scene, and is as precise as the points whose mean it is.
    scale = np.linalg.norm(points[valid].astype(np.float64), axis=-1).mean()
    both = BOUND["depth"] + BOUND["points"]
    assert (np.abs(scale * scene[0] - depth)[valid] <= both * depth[valid]).all()
    error = np.linalg.norm(scale * scene[1] - points, axis=-1)[valid]
    assert (error <= BOUND["points"] * (distance + 1.001 * np.linalg.norm(points, axis=-1)[valid])).all()


def test_twenty_kills_of_a_run_with_workers_change_no_byte(raw, tmp_path):
    shards, out, whole = CLIPS // 4, tmp_path / "out", tmp_path / "whole"

    def start(folder):
        words = ["-m", "fw_train.cli", "data", "pack", raw, folder, "--shard-size", "4", "--workers", "2"]
        return os.posix_spawn(sys.executable, [sys.executable, *map(str, words)], os.environ)

    pid = start(whole)
    while not finished_shards(whole):
        time.sleep(0.01)
    begin = time.monotonic()  # start-up takes longer than packing
    assert exit_code(pid) == 0
    assert finished_shards(whole) == shards
    left = kill_often(start, out, shards, shard_s=(time.monotonic() - begin) / shards, kills=20)
    assert len(left) == 20
    assert sum(0 < finished < shards for finished in left) >= 5, left
    assert exit_code(start(out)) == 0
    assert contents(out) == contents(whole)
