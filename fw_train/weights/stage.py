"""The result of a stage: its trained weights in one safetensors file, with the stage, step and base they belong to, and what
encoded the data.

The next stage and inference read it. Stage 0's carries the original Wan names, so that it serves as a base checkpoint.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fw_train.atomic_files import new_file
from fw_train.weights.files import CheckpointError, CheckpointReader, TensorInfo, listing, open_checkpoint
from fw_train.weights.safetensors_writing import write_safetensors
from fw_train.weights.wan import assign_parameter

FORMAT = "fw_train.weights.stage.v1"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VIDEO_STAGE = "stage0"  # trains all of the video transformer and nothing else
VIDEO_PREFIX = "video."
ENCODINGS = "encodings"  # in the metadata of trained weights, and of what is exported from them


class StageInfo(NamedTuple):
    stage: str
    step: int
    config_hash: str
    base_hash: str  # of the base weights that the stage trained on
    dtype: torch.dtype  # of all tensors
    encodings: Mapping[str, Mapping[str, Any]] | None = None  # facts of the encoders by kind; None: not known


def write_stage_weights(path: str | Path, tensors: Mapping[str, Tensor], info: StageInfo) -> None:
    """Writes the parameters, by their names in the network, so that `path` is the whole file or what it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_stage_weights(path, tensors, info):
        pass


@contextmanager
def new_stage_weights(path: Path, tensors: Mapping[str, Tensor], info: StageInfo) -> Iterator[tuple[int, str]]:
    """Writes the file, and gives it its name when the block ends without an error; its size and SHA-256."""
    stored, metadata = stage_weights_content(path.name, tensors, info)
    digest = hashlib.sha256()
    try:
        with new_file(path) as file:

            def write(data: memoryview) -> None:
                file.write(data)
                digest.update(data)

            size = write_safetensors(write, stored, metadata)
            yield size, digest.hexdigest()
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written ({error}) and is as it was before") from error


def stage_weights_content(
    name: str, tensors: Mapping[str, Tensor], info: StageInfo
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file of stage weights."""
    dtype_name = {dtype: name for name, dtype in DTYPES.items()}.get(info.dtype)
    strays = [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype != info.dtype]
    if dtype_name is None or strays or not tensors:
        raise CheckpointError(
            f"{name} is not written: stage weights are tensors of one dtype of {', '.join(DTYPES)}; got {len(tensors)} "
            f"tensors for {info.dtype}, of another dtype {listing(strays)}"
        )
    metadata = {
        "format": FORMAT,
        "stage": info.stage,
        "step": str(info.step),
        "config_hash": info.config_hash,
        "base_hash": info.base_hash,
        "dtype": dtype_name,
        **encodings_metadata(info.encodings),
    }
    return {_stored_name(info.stage, name): tensor.detach() for name, tensor in tensors.items()}, metadata


def encodings_metadata(encodings: Mapping[str, Mapping[str, Any]] | None) -> dict[str, str]:
    """The entry of the metadata that `stored_encodings` reads; none where nothing is known."""
    return {} if encodings is None else {ENCODINGS: json.dumps(encodings, sort_keys=True, allow_nan=False)}


def stored_encodings(reader: CheckpointReader) -> dict[str, dict[str, Any]] | None:
    """What trained weights, or an export of them, say their data were encoded with; None where they say nothing."""
    text = reader.metadata.get(ENCODINGS)
    if text is None or not reader.metadata.get("format", "").startswith("fw_train."):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(facts, dict) for facts in found.values()):
        raise CheckpointError(
            f"{reader.path}: metadata that make no sense: {ENCODINGS}={text!r:.60}; fetch the file again"
        )
    return found


def read_stage_info(path: str | Path) -> StageInfo:
    """What a file of stage weights says about itself."""
    return _info(open_checkpoint(path))


def validate_stage_weights(
    path: str | Path, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], stage: str, base_hash: str
) -> StageInfo:
    """Checks that a file holds exactly the `expected` parameters, trained in `stage` on the base with `base_hash`.

    Only the header is read. Whatever is wrong is listed in one error.
    """
    reader = open_checkpoint(path)
    info = _info(reader)
    problems = []
    if info.stage != stage:
        problems.append(f"it holds the weights of {info.stage} (step {info.step}), those of {stage} are expected")
    if info.base_hash != base_hash:
        problems.append(
            f"it was trained on the base {info.base_hash[:16]}..., weights.base is {base_hash[:16]}...: "
            "give the base that it was trained on"
        )
    found = _found(reader, info)
    missing = [name for name in expected if name not in found]
    if missing:
        problems.append(f"missing: {listing(missing)}")
    problems += _misfits(found, expected)
    if problems:
        raise CheckpointError(f"{reader.path} is not what this run starts from: {'; '.join(problems)}")
    return info


def load_stage_weights(model: nn.Module, path: str | Path, device: torch.device | str) -> StageInfo:
    """Puts the weights of a stage into the network; parameters that the file does not have are left alone.

    All of them or none: parameters are replaced when everything has been read, so that weights which have no storage yet
    exist once, and only those which the file replaces exist twice.
    """
    reader = open_checkpoint(path)
    info = _info(reader)
    found = _found(reader, info)
    problems = _misfits(found, {name: TensorInfo.of(parameter) for name, parameter in model.named_parameters()})
    if problems:
        raise CheckpointError(f"{reader.path} does not fit the network: {'; '.join(problems)}")
    tensors = {name: reader.tensor(_stored_name(info.stage, name)).to(device) for name in found}
    for name, tensor in tensors.items():
        assign_parameter(model, name, tensor)
    return info


def _info(reader: CheckpointReader) -> StageInfo:
    metadata = reader.metadata
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{reader.path} is not a file of stage weights: its metadata has format={metadata.get('format')}, "
            f"expected {FORMAT}; give a step-N.safetensors that a stage has written"
        )
    texts = {name: metadata.get(name, "") for name in ("stage", "step", "config_hash", "base_hash", "dtype")}
    bad = [f"{name}={text!r}" for name, text in texts.items() if not text]
    if not texts["step"].isdecimal():
        bad.append(f"step={texts['step']!r}")
    if texts["dtype"] not in DTYPES:
        bad.append(f"dtype={texts['dtype']!r}")
    if bad:
        raise CheckpointError(f"{reader.path}: metadata that make no sense: {', '.join(bad)}; fetch the file again")
    return StageInfo(
        texts["stage"],
        int(texts["step"]),
        texts["config_hash"],
        texts["base_hash"],
        DTYPES[texts["dtype"]],
        stored_encodings(reader),
    )


def _stored_name(stage: str, name: str) -> str:
    if stage != VIDEO_STAGE:
        return name
    if not name.startswith(VIDEO_PREFIX):
        raise CheckpointError(f"{VIDEO_STAGE} trains the video transformer alone, and `{name}` is no part of it")
    return name.removeprefix(VIDEO_PREFIX)


def _found(reader: CheckpointReader, info: StageInfo) -> dict[str, TensorInfo]:
    """Shapes and dtypes by the names that the parameters have in the network."""
    prefix = VIDEO_PREFIX if info.stage == VIDEO_STAGE else ""
    return {prefix + key: tensor for key, tensor in reader.shapes().items()}


def _misfits(found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> list[str]:
    shared = {name: (tensor, TensorInfo(*expected[name])) for name, tensor in found.items() if name in expected}
    lists = {
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(there.shape)}, expected {list(wanted.shape)}"
            for name, (there, wanted) in shared.items()
            if there.shape != tuple(wanted.shape)
        ],
        "of another dtype": [
            f"{name} {there.dtype}, expected {wanted.dtype}"
            for name, (there, wanted) in shared.items()
            if there.dtype != wanted.dtype
        ],
    }
    return [f"{what}: {listing(entries)}" for what, entries in lists.items() if entries]
