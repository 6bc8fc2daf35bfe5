"""The format's own library reads what we write."""

import pytest
import torch
from safetensors.torch import load

from fw_train.weights.safetensors_writing import PIECE_BYTES, write_safetensors


def written(tensors, metadata=None):
    parts = []
    size = write_safetensors(lambda data: parts.append(bytes(data)), tensors, metadata or {})
    data = b"".join(parts)
    assert len(data) == size
    return data, parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool])
def test_the_library_reads_it(dtype):
    tensors = {
        "a": torch.arange(6).reshape(2, 3).to(dtype),
        "nothing": torch.empty(0, 4, dtype=dtype),
        "scalar": torch.tensor(1).to(dtype),
        "view": torch.arange(12).to(dtype).reshape(3, 4).T[1:3],
        "ünï": torch.zeros(1, dtype=dtype),
    }
    data, _ = written(tensors, {"format": "x"})
    read = load(data)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)


def test_the_data_are_aligned_and_come_in_pieces():
    data, parts = written({"a": torch.ones(PIECE_BYTES // 4 + 5)})
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert [len(part) for part in parts[1:]] == [PIECE_BYTES, 20]
