"""Readers: every layout gives the same tensors, and every damage is an error that says what to do."""

import json
import os
import pickle
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from fw_train.weights.files import SAFETENSORS_DTYPES, CheckpointError, TensorInfo, listing, open_checkpoint


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "blocks.0.weight": torch.randn(4, 3, generator=generator),
        "blocks.0.bias": torch.randn(4, generator=generator).bfloat16(),
        "blocks.1.weight": torch.randn(2, 3, 1, 2, generator=generator).half(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 7),
        "count": torch.arange(3),
    }


def assert_holds(path, state):
    reader = open_checkpoint(path)
    assert reader.shapes() == {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in state.items()}
    for key, tensor in state.items():
        read = reader.tensor(key)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor), key
        assert read.is_contiguous()
    return reader


def write_shards(folder, state, of_key, index="model.safetensors.index.json"):
    """Shards by `of_key`, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(set(of_key.values())):
        save_file({key: state[key] for key in of_key if of_key[key] == name}, folder / name)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": of_key}))
    return folder / index


def two_shards(state):
    return {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}


def raw_safetensors(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# What can be read.


def test_a_safetensors_file(tmp_path, state):
    save_file(state, tmp_path / "x.safetensors", {"stage": "stage1"})
    reader = assert_holds(tmp_path / "x.safetensors", state)
    assert reader.metadata == {"stage": "stage1"}
    assert [(file.path, file.size) for file in reader.files] == [
        (os.path.realpath(tmp_path / "x.safetensors"), (tmp_path / "x.safetensors").stat().st_size)
    ]


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_every_dtype_reads_back_bit_for_bit(tmp_path, dtype):
    tensor = torch.randint(0, 2, (3, 8 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    read = open_checkpoint(tmp_path / "x.safetensors").tensor("x")
    assert (read.dtype, read.shape) == (dtype, tensor.shape)
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
def test_a_torch_file_plain_or_wrapped(tmp_path, state, suffix, wrapper):
    path = tmp_path / f"x{suffix}"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    reader = assert_holds(path, state)
    assert reader.metadata == {}


def test_views_and_parameters_in_a_torch_file_come_out_as_plain_contiguous_tensors(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": whole.T, "row": whole[1], "p": torch.nn.Parameter(whole)}, tmp_path / "x.pth")
    reader = assert_holds(tmp_path / "x.pth", {"t": whole.T.contiguous(), "row": whole[1], "p": whole})
    assert type(reader.tensor("p")) is torch.Tensor
    assert not reader.tensor("p").requires_grad
    assert reader.tensor("row").untyped_storage().nbytes() == 16


def test_shards_by_index_and_by_folder(tmp_path, state):
    index = write_shards(tmp_path / "model", state, two_shards(state))
    reader = assert_holds(index, state)
    assert len(reader.files) == 3  # the index counts too
    assert_holds(tmp_path / "model", state)


@pytest.mark.parametrize("place", ["", "transformer"])
@pytest.mark.parametrize("name", ["anything.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_folder_with_one_safetensors_file(tmp_path, state, place, name):
    (tmp_path / place).mkdir(exist_ok=True)
    save_file(state, tmp_path / place / name)
    torch.save({}, tmp_path / "Wan2.1_VAE.pth")
    assert_holds(tmp_path, state)


def test_in_a_folder_of_several_files_the_diffusers_name_decides(tmp_path, state):
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert_holds(tmp_path, state)


def test_symbolic_links_to_shards_are_followed(tmp_path, state):
    """As in the cache of the Hugging Face hub."""
    write_shards(tmp_path / "blobs", state, two_shards(state))
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert_holds(tmp_path / "snapshot", state)


def test_opening_reads_no_tensor_data(tmp_path):
    """A sparse file stands for one that would not fit into memory."""
    size = 1 << 38
    header = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    path = raw_safetensors(tmp_path / "x.safetensors", header, b"")
    os.truncate(path, path.stat().st_size + size)
    assert open_checkpoint(path).shapes() == {"x": TensorInfo((size,), torch.uint8)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_tensor_is_in_memory_of_its_own(tmp_path, suffix):
    """Overwriting or shortening the file must not reach weights that were read before."""
    path = tmp_path / f"x{suffix}"
    state = {"x": torch.arange(100_000.0)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    reader = open_checkpoint(path)
    tensor = reader.tensor("x")
    del reader
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(tensor, state["x"])
    tensor += 1
    assert not any(path.read_bytes())


# What is refused.


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.safetensors", "no such file or folder"), ("x.npz", "none of *.safetensors, *.index.json, *.pth")],
)
def test_no_file_or_one_of_another_kind(tmp_path, name, message):
    (tmp_path / "x.npz").write_bytes(b"x")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / name)
    assert message in str(error.value)
    assert name in str(error.value)


def test_an_unknown_tensor(tmp_path, state):
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensor `y`"):
        open_checkpoint(tmp_path / "x.safetensors").tensor("y")


def test_a_truncated_file_names_both_sizes(tmp_path, state):
    path = tmp_path / "x.safetensors"
    save_file(state, path)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(
        CheckpointError, match=rf"x\.safetensors is truncated: expected {size} bytes, found {size - 1}; fetch"
    ):
        open_checkpoint(path)


def test_a_file_cut_or_grown_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(5), "b": torch.randn(2, 2)}, path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match="fetch"):
            open_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="has bytes after its end"):
        open_checkpoint(path)


def test_a_damaged_header_is_a_clear_error_or_harmless(tmp_path):
    source, path = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file({"a": torch.randn(5), "b": torch.randn(2, 2).bfloat16()}, source, {"k": "v"})
    data, pick, refusals = source.read_bytes(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(pick.choice((1, 2, 8))):
            damaged[pick.randrange(8, len(data) - 28)] = pick.choice(b'"[]{}:,0129a\xff')
        path.write_bytes(damaged)
        try:
            reader = open_checkpoint(path)
            for key in reader.shapes():
                reader.tensor(key)
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 200
    assert all(str(path) in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, r"F32 of shape \[2\] does not fill the bytes 0 to 4"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "does not fill"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, "dtype 'F4'; known are"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "begin at 4, where 0 was expected"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "not described by"),
        ("F32", "not described by"),
    ],
)
def test_a_tensor_that_contradicts_its_bytes(tmp_path, described, message):
    path = raw_safetensors(tmp_path / "x.safetensors", {"a": described}, bytes(8))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_tensors_that_overlap_are_refused(tmp_path):
    part = {"dtype": "U8", "shape": [4]}
    header = {"a": {**part, "data_offsets": [0, 4]}, "b": {**part, "data_offsets": [2, 6]}}
    with pytest.raises(CheckpointError, match="`b` begin at 2, where 4"):
        open_checkpoint(raw_safetensors(tmp_path / "x.safetensors", header, bytes(6)))


def test_a_key_given_twice_in_one_file(tmp_path):
    entry = b'"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}'
    path = raw_safetensors(tmp_path / "x.safetensors", b"{" + entry + b", " + entry + b"}", bytes(4))
    with pytest.raises(CheckpointError, match=r"given twice: 1 \(a\)"):
        open_checkpoint(path)


def test_a_git_lfs_pointer(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(path)


def test_a_page_of_html_instead_of_weights(tmp_path):
    (tmp_path / "x.safetensors").write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(CheckpointError, match="not a safetensors file; fetch it again"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_a_file_that_changes_after_it_was_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(4)}, path)
    reader = open_checkpoint(path)
    save_file({"x": torch.ones(5)}, path)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        reader.tensor("x")


def test_a_folder_without_weights_or_with_several(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        CheckpointError, match=r"several checkpoints, 2 \(a\.safetensors, b\.safetensors\): name the one"
    ):
        open_checkpoint(tmp_path)


def test_shards_without_their_index(tmp_path, state):
    write_shards(tmp_path, state, two_shards(state)).unlink()
    with pytest.raises(CheckpointError, match=r"\*\.safetensors\.index\.json is missing"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path, state):
    index = write_shards(tmp_path, state, two_shards(state))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing: 1 \(model-00002-of-00002\.safetensors\)"):
        open_checkpoint(index)


def test_a_truncated_shard_is_named(tmp_path, state):
    index = write_shards(tmp_path, state, two_shards(state))
    shard = tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is truncated"):
        open_checkpoint(index)


def test_an_index_and_shards_that_do_not_belong_together(tmp_path, state):
    placed = two_shards(state)
    index = write_shards(tmp_path, state, placed)
    first, second = sorted(set(placed.values()))
    keys = {name: [key for key in placed if placed[key] == name] for name in (first, second)}
    moved, lost = keys[first][0], keys[second][0]
    save_file(
        {**{key: state[key] for key in keys[second] if key != lost}, moved: state[moved], "new": torch.zeros(1)},
        tmp_path / second,
    )
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(index)
    text = str(error.value)
    assert f"held by more than one shard: 1 ({moved} in {first} and {second})" in text
    assert f"named by the index but not in that shard: 1 ({lost} in {second})" in text
    assert f"in a shard but not in the index: 1 (new in {second})" in text


def test_an_index_that_points_to_the_wrong_shard(tmp_path, state):
    placed = two_shards(state)
    index = write_shards(tmp_path, state, placed)
    key = next(iter(placed))
    placed[key] = sorted(set(placed.values()) - {placed[key]})[0]
    index.write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(CheckpointError, match=rf"not in that shard: 1 \({key} in {placed[key]}\)"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "x.pth", "..", ""]
)
def test_an_index_may_name_only_files_beside_it(tmp_path, name):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="beside the index"):
        open_checkpoint(index)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff", "[" * 100_000]
)
def test_an_unreadable_index(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match="fetch it again"):
        open_checkpoint(index)


class Gadget:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_pickle_gadget_is_refused_and_does_not_run(tmp_path, form):
    path, canary = tmp_path / "x.pth", tmp_path / "canary"
    payload = {"state_dict": {"a": torch.zeros(1)}, "hook": Gadget(canary)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert not canary.exists()
    assert "weights_only" not in str(error.value), "torch's own message advises to switch the protection off"
    if form == "zip":
        assert "`posix.mkdir`" in str(error.value)
        assert "could run code" in str(error.value)
    else:
        assert "torch's zip format" in str(error.value)
    torch.load(path, weights_only=False) if form != "bare pickle" else pickle.loads(path.read_bytes())
    assert canary.exists(), "the gadget of this test works where it is let"


def test_a_truncated_torch_file(tmp_path, state):
    path = tmp_path / "x.pth"
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"x\.pth \(\d+ bytes\) is not readable: .*fetch it again"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1), "step": 3}, r"1 \(step \(int\)\)"),
        ({0: torch.zeros(1)}, r"1 \(0 \(Tensor\)\)"),
        ({"a": torch.eye(2).to_sparse()}, r"1 \(a \(Tensor\)\)"),
        ({"a": torch.empty(2, device="meta")}, r"1 \(a \(Tensor\)\)"),
        ([torch.zeros(1)], "holds a list"),
        ({"model": {}, "state_dict": {}}, "state_dict and model"),
    ],
)
def test_a_torch_file_with_something_else_than_named_tensors(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "x.pth")


def test_long_lists_are_cut():
    assert listing("abc") == "3 (a, b, c)"
    assert listing(map(str, range(11))) == "11 (0, 1, 2, 3, 4, 5, 6, 7, and 3 more)"
