import argparse
import re

import pytest
from packed_clips import make_packed

from data_tools import bench_data


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_packed(tmp_path_factory.mktemp("bench"), ((3, 32, 48, 5),), kinds=())


def run(*words):
    parser = argparse.ArgumentParser()
    bench_data.add_arguments(parser)
    assert bench_data.run(parser.parse_args([str(word) for word in words])) == 0


def rows(text):
    return {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("| ")}


def test_loaders_take_turns_and_time_is_told_apart(packed, capsys):
    run(packed, "--raw", packed.parent / "raw", "--workers", 0, 1, "--samples", 3, "--repeats", 1, "--cold")
    found = rows(capsys.readouterr().out)
    for name in ("this loader", "webdataset, same tars", "npy folders"):
        processes, rate, _, megabytes, cpu_ms, ratio = (
            float(cell.strip().rstrip("x").split("-")[0]) for cell in found[name]
        )
        assert processes == 1
        assert rate > 0
        assert megabytes >= 0
        assert cpu_ms >= 0
        assert ratio == 1 if name == "this loader" else ratio > 0
    parts = {name: float(found[name][0]) for name in ("read and check", "video", "entropy, depth", "hand-over")}
    assert 0 < parts["video"] < 1000 * sum(parts.values())


def test_latents(packed, capsys):
    before = sorted(packed.parent.iterdir())
    run(packed, "--latents", "--workers", 0, "--samples", 4, "--repeats", 1)
    assert float(rows(capsys.readouterr().out)["latents and texts"][1]) > 0
    assert sorted(packed.parent.iterdir()) == before


def test_memory_is_drawn(packed, tmp_path, capsys):
    run(packed, "--memory", 20, "--workers", 1, "--plot", tmp_path / "memory.png")
    found = rows(capsys.readouterr().out)
    assert float(found["trainer"][1].split()[0]) > 50
    assert float(found["process 1"][1].split()[0]) > 50
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_opening_a_long_table(packed, capfd, workers):
    before = sorted(packed.parent.iterdir())
    run(packed, "--open", 2000, "--workers", workers)
    text, complaints = capfd.readouterr()
    found = rows(text)
    cases = ["labels, video", "labels, latents, texts", "labels, latents, texts, 1000 in quarantine"]
    assert list(found) == ["a table of 2000 samples", *cases]
    for name in cases:
        processes, _, cpu, cpu_all, *memory = found[name]
        assert int(processes) == workers
        assert 0 < float(cpu.split()[0]) <= float(cpu_all.split()[0])
        for cell in memory[: 1 + workers]:
            resident, batches, share = map(float, re.findall(r"\d+", cell))
            assert 0 <= batches < resident
            assert 0 < share < resident
    assert "resuming at sample 6000 of 10000" in text
    assert "cannot be read" not in complaints
    assert sorted(packed.parent.iterdir()) == before
