import io
import json
import multiprocessing
import pickle
import random
import shutil
import tarfile

import pytest
import safetensors.torch
import torch
from sidecars import SHAPES, make_all_sidecars, make_noise_dataset, make_sidecar, noise_facts, noise_tensor

from fw_train.data import sidecar_files
from fw_train.data.manifest import Dataset, seal, unseal
from fw_train.data.schema import SIDECAR_SUFFIXES, Bucket
from fw_train.data.shards import ShardError, scan_tar
from fw_train.data.sidecar import KINDS, Sidecar, fingerprint, read_empty_text
from fw_train.data.sidecar_files import SIDECAR
from fw_train.data.sidecar_tensor import DTYPES, latent_shape, parse_tensor, tensor_bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sidecars") / "out"
    make_all_sidecars(folder)
    return folder


@pytest.fixture
def out(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def read_all(folder):
    """Every number that a loader could get."""
    dataset = Dataset(folder)
    tensors = {(kind, row): Sidecar(dataset, kind).read(row)[kind] for kind in KINDS for row in range(len(dataset))}
    return {**tensors, "empty": read_empty_text(dataset)}


def test_row_r_holds_what_was_made_of_row_r(made):
    dataset = Dataset(made)
    for kind in KINDS:
        sidecar = Sidecar(dataset, kind)
        assert len(sidecar) == len(dataset) == 5
        assert sidecar.facts == noise_facts(kind)
        for row in (4, 0, 3, 1, 2):
            (name, tensor), *rest = sidecar.read(row).items()
            assert (name, rest, tensor.dtype) == (kind, [], DTYPES[kind])
            wanted = noise_tensor(kind, row, SHAPES[0 if row < 3 else 1])
            assert torch.equal(tensor, wanted.to(DTYPES[kind]))
    assert torch.equal(read_empty_text(dataset), noise_tensor("text", 99).bfloat16())


def test_tars_are_plain_with_the_names_of_the_schema(made):
    for kind, suffix in zip(KINDS, SIDECAR_SUFFIXES, strict=True):
        with tarfile.open(made / kind / "shard-000000.tar") as tar:
            assert tar.getnames() == [f"{key}.{suffix}" for key in ("a-b", "a", "b")]
            data = tar.extractfile(f"a.{suffix}").read()
        assert list(safetensors.torch.load(data)) == [kind]


def test_writing_again_gives_the_same_bytes(made, tmp_path):
    make_all_sidecars(tmp_path / "again")
    for path in made.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(made)).read_bytes() == path.read_bytes(), path


def read_in_process(sidecar, row, queue):
    queue.put(sidecar.read(row)["latent"].float().sum().item())


def test_a_sidecar_is_pickled_small_and_read_in_other_processes(made):
    sidecar = Sidecar(Dataset(made), "latent")
    wanted = [sidecar.read(row)["latent"].float().sum().item() for row in (1, 4)]
    assert len(pickle.dumps(sidecar)) < 600
    copy = pickle.loads(pickle.dumps(sidecar))
    assert (copy.fingerprint, copy.facts) == (sidecar.fingerprint, sidecar.facts)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    for row in (1, 4):
        process = context.Process(target=read_in_process, args=(sidecar if row == 1 else copy, row, queue))
        process.start()
        assert queue.get(timeout=20) == wanted[0 if row == 1 else 1]
        process.join()


def test_copies_read_no_manifest(out):
    data = pickle.dumps(Sidecar(Dataset(out), "latent"))
    (out / "latent/sidecar.jsonl").unlink()
    (out / "manifest.jsonl").unlink()
    assert torch.equal(pickle.loads(data).read(2)["latent"], noise_tensor("latent", 2).half())


def test_opening_and_reading_touch_one_row_and_no_index(out):
    for path in out.glob("*/*.index.jsonl"):
        path.unlink()
    with open(out / "latent/samples.bin", "r+b") as file:  # a damaged row of another sample
        file.seek(3)
        file.write(b"\xff")
    sidecar = Sidecar(Dataset(out), "latent")
    assert torch.equal(sidecar.read(2)["latent"], noise_tensor("latent", 2).half())
    with pytest.raises(ShardError, match="row 0 is damaged; run `fw data encode`"):
        sidecar.read(0)


def flip(data, bit):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_gives_a_wrong_number(out, kind):
    """Each file that reading needs: removed, cut anywhere, or with any bit flipped, it raises or changes nothing."""
    whole = read_all(out)
    rng = random.Random(1)
    for path in sorted((out / kind).iterdir()):
        data = path.read_bytes()
        needed = not path.name.endswith(".index.jsonl")
        path.unlink()
        if needed:
            with pytest.raises(ShardError, match=path.name):
                read_all(out)
        cuts = [data[:length] for length in (0, 1, len(data) // 2, len(data) - 1)]
        bits = [0, 8 * len(data) - 1, *(rng.randrange(8 * len(data)) for _ in range(30))]
        for damaged in (*cuts, *(flip(data, bit) for bit in bits)):
            path.write_bytes(damaged)
            try:
                found = read_all(out)
            except ShardError:
                continue
            assert all(torch.equal(found[name], whole[name]) for name in whole), path
            # What is not noticed lies between the members of a tar, which are read by position.
            assert not needed or (path.suffix == ".tar" and 2 * len(damaged) > len(data) + 2), path
        path.write_bytes(data)


def test_what_is_missing_names_the_command(out):
    dataset = Dataset(out)
    (out / "latent" / SIDECAR).unlink()
    with pytest.raises(ShardError, match="latent is not finished: .*fw data encode"):
        Sidecar(dataset, "latent")
    shutil.rmtree(out / "text")
    with pytest.raises(ShardError, match="text is missing: .*fw data encode"):
        read_empty_text(dataset)
    with pytest.raises(ValueError, match="no kind of sidecar; there are clip, image, latent, text"):
        Sidecar(dataset, "../latent")


def test_a_sidecar_of_another_dataset_is_refused(out, tmp_path):
    other = make_noise_dataset(tmp_path / "other", salt=b"x")
    shutil.copytree(out / "latent", other.folder / "latent")
    with pytest.raises(ShardError, match="made for other samples"):
        Sidecar(other, "latent")


def test_rows_of_another_order_are_refused(out):
    path = out / "latent/samples.bin"
    rows = path.read_bytes()
    size = sidecar_files.ROW.itemsize
    path.write_bytes(rows[size : 2 * size] + rows[:size] + rows[2 * size :])
    with pytest.raises(ShardError, match="row 0 belongs to a, the dataset's to a-b"):
        Sidecar(Dataset(out), "latent").read(0)


def test_a_changed_fingerprint_is_refused_with_what_differs(made):
    sidecar = Sidecar(Dataset(made), "latent")
    sidecar.require(noise_facts("latent"))
    wanted = noise_facts("latent", encoder="other", frames=81)
    with pytest.raises(ShardError) as raised:
        sidecar.require(wanted)
    for part in (
        sidecar.fingerprint[:16],
        fingerprint(wanted)[:16],
        "encoder: 'noise' there, 'other' here",
        "--replace",
    ):
        assert part in str(raised.value)
    assert "size" not in str(raised.value)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def edit(path, change):
    lines = unseal(path.read_bytes(), "")
    change(lines)
    path.write_bytes(seal(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1].update(encoder="forged"), "facts do not have the fingerprint"),
        (lambda lines: lines[0].update(schema=2), "schema 2 is unknown"),
        (lambda lines: lines[0].update(member="text.safetensors"), "does not say what it is"),
        (lambda lines: lines[0].update(more=1), "unknown 'more'"),
        (lambda lines: lines.pop(), "does not say what it is"),
        (lambda lines: lines[2].update(shard="../../x"), "made for other samples"),
        (lambda lines: lines[:] and lines.clear(), "schema None is unknown"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(out, change, message):
    edit(out / "latent" / SIDECAR, change)
    with pytest.raises(ValueError, match=message):
        Sidecar(Dataset(out), "latent")


def crafted(header, data=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F16"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NUMBERS = bytes(2 * 16 * 4)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        (1 << 60).to_bytes(8, "little") + b"{}",
        crafted(b"not json"),
        crafted({}),
        crafted({"text": entry([16, 1, 2, 2], 0, 128)}, NUMBERS),  # another kind's name
        crafted({"latent": entry([16, 1, 2, 2], 0, 128), "more": entry([0], 128, 128)}, NUMBERS),
        crafted({"latent": entry([16, 1, 2, 2], 0, 64)}, NUMBERS),
        crafted({"latent": entry([16, 1, 2, 2], 64, 192)}, NUMBERS),
        crafted({"latent": entry([1 << 40, 1 << 40, 2, 2], 0, 128)}, NUMBERS),
        crafted({"latent": entry([16, 1, 2, 2], 0, 128)}, NUMBERS + b"\x00"),
        crafted({"latent": entry([16, 1, 2, 2], 0, 128)}, NUMBERS[:-1]),
        crafted({"latent": entry([16, 1, 2, 2], 0, 128, "BF16")}, NUMBERS),
        crafted({"latent": entry([16, 1, 2, 2], 0, 128, "F99")}, NUMBERS),
        crafted({"latent": entry([64], 0, 128)}, NUMBERS),
        crafted({"latent": entry([8, 2, 2, 2], 0, 128)}, NUMBERS),
        crafted({"latent": entry([16, 0, 2, 2], 0, 0)}),
        crafted({"latent": entry([16, 1, 2, 2], 0, 128)}, b"\x00\x7c" + NUMBERS[2:]),  # infinity
        crafted({"latent": entry([16, 1, 2, 2], 0, 128)}, NUMBERS[:-2] + b"\x01\x7e"),  # NaN
    ],
)
def test_crafted_members_are_refused(data):
    with pytest.raises(ShardError, match="^member "):
        parse_tensor("latent", data, "member")


def test_a_plain_member_is_read():
    data = crafted({"latent": entry([16, 1, 2, 2], 0, 128)}, NUMBERS)
    assert torch.equal(parse_tensor("latent", data, "member"), torch.zeros(16, 1, 2, 2, dtype=torch.float16))


def test_numbers_that_the_stored_dtype_cannot_hold_are_refused():
    with pytest.raises(ShardError, match="clip_1 holds NaN or infinity"):
        tensor_bytes("latent", torch.full((16, 1, 2, 2), 1e6), "clip_1")


@pytest.mark.parametrize("kind", ["clip", "text"])
def test_every_value_is_stored_but_nan_and_infinity(kind):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(DTYPES[kind])
    finite = every[every.isfinite()][None]
    assert torch.equal(parse_tensor(kind, tensor_bytes(kind, finite, "it"), "it"), finite)
    others = every[~every.isfinite()]
    for value in (*others[::61], *others[:2], *others[-2:], torch.tensor(float("inf")), torch.tensor(float("-inf"))):
        with pytest.raises(ShardError, match="NaN or infinity"):
            tensor_bytes(kind, value.reshape(1, 1), "it")


def test_a_crafted_tar_is_refused(tmp_path):
    for name in ("/a.latent.safetensors", "../a.latent.safetensors", "a.b.latent.safetensors", "a.pickle"):
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        with pytest.raises(ShardError):
            scan_tar(tmp_path / "x.tar", ["latent.safetensors"])


def test_latents_of_another_size_than_the_bucket_are_refused(tmp_path):
    dataset = make_noise_dataset(tmp_path / "out")
    make_sidecar(dataset, "latent", tensor=lambda kind, row, shape: noise_tensor(kind, row, (16, 2, 4, 6)))
    sidecar = Sidecar(dataset, "latent")
    sidecar.read(2)
    with pytest.raises(ShardError, match=r"is \[16, 2, 4, 6\], its bucket needs \[16, 3, 8, 4\]"):
        sidecar.read(3)


def test_shapes_follow_from_facts_or_bucket():
    bucket = Bucket(32, 48, 81)
    assert latent_shape({"size": "native", "frames": "native"}, bucket) == (16, 21, 4, 6)
    assert latent_shape({"size": [64, 80], "frames": 5}, bucket) == (16, 2, 8, 10)
    for facts in ({}, {"size": "other", "frames": 5}, {"size": [64], "frames": 5}, {"size": "native", "frames": 6}):
        with pytest.raises(ShardError, match="are no shape"):
            latent_shape(facts, bucket)


def test_shards_that_were_not_made_alike_do_not_join(tmp_path):
    dataset = make_noise_dataset(tmp_path / "out")
    make_sidecar(dataset, "clip")
    line = dataset.manifest.shards[1]
    tensors = [(dataset.sample(row).key, noise_tensor("clip", row)) for row in (3, 4)]
    sidecar_files.write_shard(tmp_path / "out/clip", "clip", line, noise_facts("clip", encoder="b"), tensors)
    with pytest.raises(ShardError, match="encoder: 'noise' there, 'b' here"):
        sidecar_files.finish_sidecar(tmp_path / "out/clip", "clip", dataset.manifest)
    with pytest.raises(ShardError, match="1 samples; the dataset has 2"):
        sidecar_files.write_shard(tmp_path / "out/clip", "clip", line, noise_facts("clip"), tensors[:1])
