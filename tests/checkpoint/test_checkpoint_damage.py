"""Damage of any kind, anywhere in a checkpoint, is found and named; with `auto` the one before it is loaded."""

import hashlib
import json
import logging
import os
import pickle
import random
import shutil

import pytest
from checkpoint_samples import blank, flat_fragments, gathered, run_state, same, stage_info, values
from forked_ranks import alone, run_ranks

import fw_train.checkpoint.fragments as fragments_module
from fw_train.checkpoint.fragments import read_index
from fw_train.checkpoint.layout import MANIFEST, open_checkpoint_folder, read_manifest, scan
from fw_train.checkpoint.loading import load, verify_checkpoint
from fw_train.checkpoint.saver import CheckpointSaver, SaveParams, StageWeights
from fw_train.weights.files import CheckpointError

SHAPES = {"geo.weight": (40, 60), "geo.bias": (7,), "token": (1, 3)}
OLD, NEW = values(SHAPES, 1), values(SHAPES, 2)
PAGE = 4096


def save(output, world, step, state, **params):
    saver = CheckpointSaver(output, world, SaveParams(**params))
    fragments = flat_fragments(SHAPES, state, world.rank, world.size)
    weights = StageWeights({"geo.weight": state["geo.weight"][0].bfloat16()}, stage_info(step))
    saver.save(step, fragments, run_state(step, world.size), weights if world.rank == 0 else None)
    return saver.wait()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    output = tmp_path_factory.mktemp("pristine")
    run_ranks(2, lambda world: [str(save(output, world, 4, OLD)), str(save(output, world, 5, NEW))])
    return output


@pytest.fixture
def output(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "output")
    return tmp_path / "output"


@pytest.fixture
def small_chunks(monkeypatch):
    """4 KiB chunks, so that small files have several."""
    monkeypatch.setattr(fragments_module, "CHUNK_BYTES", PAGE)


def attempt(output, which):
    fragments = flat_fragments(SHAPES, blank(SHAPES), 0, 1)
    state = load(output, which, fragments, alone())
    return state.step, gathered([fragments])


def files_of(output, step):
    return sorted((output / "checkpoints" / f"step-{step}").iterdir())


def found_everywhere(output, file):
    """A resume refuses and names the file, `auto` takes the one before it, and the full check names the file as well."""
    for which in ("latest", 5):
        with pytest.raises(CheckpointError, match=file.name) as error:
            attempt(output, which)
        assert "run.resume=auto" in str(error.value)
    step, state = attempt(output, "auto")
    assert step == 4
    assert same(state, OLD)
    assert any(str(file) in problem for problem in verify_checkpoint(output / "checkpoints" / "step-5"))
    return str(error.value)


def test_the_pristine_one_is_whole(output):
    step, state = attempt(output, "latest")
    assert step == 5
    assert same(state, NEW)
    assert verify_checkpoint(output / "checkpoints" / "step-5") == []


def test_a_flipped_bit_in_every_page_of_every_file(output):
    draw = random.Random(0)
    for file in files_of(output, 5):
        data = file.read_bytes()
        for begin in range(0, len(data), PAGE):
            place = draw.randrange(begin, min(begin + PAGE, len(data)))
            damaged = bytearray(data)
            damaged[place] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            found_everywhere(output, file)
        file.write_bytes(data)
    assert attempt(output, "latest")[0] == 5


@pytest.mark.parametrize("name", [MANIFEST, "rank-00001.json"])
def test_every_byte_of_what_describes_the_data(output, name):
    """In each a bit, and the one that turns e into E, which JSON reads as the same number."""
    checkpoint = open_checkpoint_folder(output / "checkpoints" / "step-5")
    read = {MANIFEST: lambda: read_manifest(file), "rank-00001.json": lambda: read_index(checkpoint, 1)}[name]
    file = checkpoint.path / name
    data, missed = file.read_bytes(), []
    with open(file, "r+b", buffering=0) as opened:
        for place, byte in enumerate(data):
            for bit in {place % 8, 5}:
                os.pwrite(opened.fileno(), bytes([byte ^ 1 << bit]), place)
                try:
                    read()
                    missed.append((place, bit))
                except CheckpointError:
                    pass
            os.pwrite(opened.fileno(), bytes([byte]), place)
    assert missed == []
    assert attempt(output, "latest")[0] == 5


def test_the_damaged_bytes_are_named(small_chunks, tmp_path):
    for step, state in ((4, OLD), (5, NEW)):
        save(tmp_path, alone(), step, state)
    file = files_of(tmp_path, 5)[2]
    with open(file, "r+b") as opened:
        opened.seek(2 * PAGE + 17)
        opened.write(b"\xff")
    assert f"{PAGE * 2} to {PAGE * 3}" in found_everywhere(tmp_path, file)
    assert len(verify_checkpoint(tmp_path / "checkpoints" / "step-5")) == 1


def test_files_cut_extended_swapped_and_missing(output):
    for file in files_of(output, 5):
        data = file.read_bytes()
        lengths = {0, 1, 7, 8, len(data) // 3, len(data) // 2, len(data) - 1, *range(0, len(data), PAGE)}
        for length in sorted(lengths):
            file.write_bytes(data[:length])
            found_everywhere(output, file)
        file.write_bytes(data + b"\0")
        found_everywhere(output, file)
        file.unlink()
        found_everywhere(output, file)
        old = (output / "checkpoints" / "step-4" / file.name).read_bytes()
        file.write_bytes(old)
        if file.name != MANIFEST:
            found_everywhere(output, file)
        file.write_bytes(data)


def test_a_manifest_of_another_step(output):
    """Its seal is right, and it belongs elsewhere."""
    shutil.copy(output / "checkpoints" / "step-4" / MANIFEST, output / "checkpoints" / "step-5" / MANIFEST)
    with pytest.raises(CheckpointError, match="step-5 holds step 4; folders of checkpoints keep their names"):
        attempt(output, "latest")


def test_the_whole_checkpoint_verifies_its_stage_weights_too(output):
    file = output / "step-5.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify_checkpoint(output / "checkpoints" / "step-5") == [
        f"{file} is not what was committed with step-5 (SHA-256 differs)"
    ]
    assert attempt(output, "latest")[0] == 5, "a resume does not read it"
    file.unlink()
    assert verify_checkpoint(output / "checkpoints" / "step-5") == [f"{file} is missing"]


def test_nothing_whole_is_left(output):
    for step in (4, 5):
        file = files_of(output, step)[2]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged; the last: .*step-4/rank-00000"):
        attempt(output, "auto")
    for step in (4, 5):
        files_of(output, step)[0].unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: 2 \("):
        attempt(output, "auto")
    with pytest.raises(CheckpointError, match="is missing"):
        attempt(output, "latest")


def test_giving_a_checkpoint_up_is_loud_and_saving_the_step_again_repairs_it(output, caplog):
    file = files_of(output, 5)[2]
    os.truncate(file, 100)
    with caplog.at_level(logging.WARNING):
        attempt(output, "auto")
    assert "GIVING UP the checkpoint" in caplog.text
    assert str(file) in caplog.text
    assert save(output, alone(), 5, OLD).error == ""
    step, state = attempt(output, "latest")
    assert step == 5
    assert same(state, OLD)
    assert scan(output / "checkpoints").damaged == []


def damaged_for_one_rank(world, output):
    fragments = flat_fragments(SHAPES, blank(SHAPES), world.rank, world.size)
    state = load(output, "auto", fragments, world)
    return state.step, [f.master.tolist() for f in fragments]


def test_all_ranks_give_up_what_one_of_them_finds_damaged(output):
    """Each rank reads what it had saved itself."""

    file = output / "checkpoints" / "step-5" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    results = run_ranks(2, lambda world: damaged_for_one_rank(world, output))
    assert [step for step, _ in results] == [4, 4]
    held = [flat_fragments(SHAPES, OLD, rank, 2) for rank in range(2)]
    assert [masters for _, masters in results] == [[f.master.tolist() for f in part] for part in held]


class Gadget:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def test_a_pickle_in_any_place_is_never_run(output, tmp_path):
    canary = tmp_path / "canary"
    for payload in (pickle.dumps(Gadget(canary)), pickle.dumps(Gadget(canary), protocol=0)):
        for file in [*files_of(output, 5), output / "checkpoints" / "step-5" / "extra.pt"]:
            before = file.read_bytes() if file.exists() else None
            file.write_bytes(payload)
            if before is None:
                assert attempt(output, "latest")[0] == 5, "what the manifest does not name is not read"
                file.unlink()
            else:
                found_everywhere(output, file)
                file.write_bytes(before)
    assert not canary.exists()
    pickle.loads(payload)
    assert canary.exists(), "the gadget works where it is let"


def resealed(output, change_manifest=None, change_index=None):
    """Step 5 by somebody who knows the format: all hashes are right."""
    folder = output / "checkpoints" / "step-5"
    payload = json.loads((folder / MANIFEST).read_bytes())["payload"]
    if change_index:
        tree = json.loads((folder / "rank-00000.json").read_bytes())
        data = json.dumps(change_index(tree)).encode()
        (folder / "rank-00000.json").write_bytes(data)
        payload["files"][1] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        payload["files"][0]["sha256"] = hashlib.sha256("".join(map(str, tree["chunks"])).encode()).hexdigest()
    if change_manifest:
        payload = change_manifest(payload)
    digest = hashlib.sha256(json.dumps(payload, indent=1).encode()).hexdigest()
    (folder / MANIFEST).write_bytes(json.dumps({"payload": payload, "sha256": digest}, indent=1).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"step": -1}, "are not counts"),
        (lambda p: p | {"step": True}, "are not counts"),
        (lambda p: p | {"save_number": 1 << 60}, "are not counts"),
        (lambda p: p | {"state": p["state"] | {"world_size": 10**9}}, "1000000000 ranks"),
        (lambda p: p | {"state": p["state"] | {"step": 6}}, "its state is of step 6"),
        (lambda p: p | {"state": {"step": 5}}, "does not have the entries"),
        (lambda p: p | {"files": p["files"][:2]}, "not those of 2 ranks"),
        (lambda p: p | {"files": [p["files"][0] | {"name": "../../x"}, *p["files"][1:]]}, "not those of 2 ranks"),
        (lambda p: p | {"files": [p["files"][0] | {"size": 1 << 70}, *p["files"][1:]]}, "no record of a file"),
        (lambda p: p | {"weights": p["weights"] | {"name": "/etc/passwd"}}, "its weights are in"),
        (
            lambda p: p | {"format": "fw_train.checkpoint.loading.v2"},
            "this version reads fw_train.checkpoint.loading.v1",
        ),
        (lambda p: p | {"more": 1}, "its entries are"),
        (lambda p: [], "is damaged"),
    ],
)
def test_a_hostile_manifest(output, change, message):
    resealed(output, change_manifest=change)
    with pytest.raises(CheckpointError, match=message):
        attempt(output, "latest")
    assert attempt(output, "auto")[0] == 4


def piece(tree, number, **changes):
    name, shape, start, numel = tree["pieces"][number]
    new = {"name": name, "shape": shape, "start": start, "numel": numel} | changes
    tree["pieces"][number] = list(new.values())
    return tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: piece(t, 0, numel=10**15, shape=[10**15]), "do not make a data file of"),
        (lambda t: piece(t, 0, numel=-1), "is no piece of a parameter"),
        (lambda t: piece(t, 0, start=10**6), "is no piece of a parameter"),
        (lambda t: piece(t, 0, shape=[40, "60"]), "is no piece of a parameter"),
        (lambda t: piece(t, 0, shape=[1 << 60, 1 << 60]), "is no piece of a parameter"),
        (lambda t: piece(t, 0, start=1), r"geo.weight: elements 0 to 1 are missing"),
        (lambda t: piece(t, 0, name="other"), r"other: elements \d+ to 2400 are missing"),
        (lambda t: piece(t, 0, shape=[60, 40]), r"geo.weight has the shapes \[40, 60\] and \[60, 40\]"),
        (lambda t: t | {"size": 1 << 40}, "disagree about|do not make a data file"),
        (lambda t: t | {"chunks": [t["chunks"][0].upper()]}, "makes no sense"),
        (lambda t: t | {"chunks": [7]}, "makes no sense"),
        (lambda t: t | {"chunks": t["chunks"] * 2}, "do not make up"),
        (lambda t: t | {"chunk_bytes": 1}, "do not make up"),
        (lambda t: t | {"pieces": [[]]}, "is damaged"),
        (lambda t: t | {"pieces": 5}, "is damaged"),
        (lambda t: {"pieces": t["pieces"], "chunks": t["chunks"]}, "this is not fw_train.checkpoint_rank.v1"),
    ],
)
def test_a_hostile_index(output, change, message):
    resealed(output, change_index=change)
    with pytest.raises(CheckpointError, match=message):
        attempt(output, "latest")
    assert attempt(output, "auto")[0] == 4


def test_json_that_is_nested_a_million_times(output):
    for file in files_of(output, 5)[:2]:
        before = file.read_bytes()
        file.write_bytes(b"[" * 1_000_000)
        found_everywhere(output, file)
        file.write_bytes(before)
