"""The files of an export: complete under their names or not there, one tensor in memory at a time.

FILE.safetensors                                   one file, however large
FOLDER/model.safetensors                           one shard, or
FOLDER/model-00001-of-00003.safetensors ...        several, with model.safetensors.index.json
FOLDER/diffusion_pytorch_model*, config.json       where diffusers is to find them
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fw_train.atomic_files import PARTIAL, new_file, sync, write_file
from fw_train.export.tensors import Export, ExportedTensor
from fw_train.weights.safetensors_writing import Described, write_streamed

SHARD_BYTES = 5_000_000_000
STEMS = {"original": "model", "diffusers": "diffusion_pytorch_model"}
_OURS = re.compile(r"(?:model|diffusion_pytorch_model)(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?|config\.json")


class WrittenFile(NamedTuple):
    path: Path
    size: int
    sha256: str


def write_export(
    output: Path, export: Export, shard_bytes: int = SHARD_BYTES, force: bool = False
) -> list[WrittenFile]:
    """Writes a file if `output` ends in .safetensors, else a folder; the files, with what they hold."""
    _refuse_to_overwrite(output, force)
    output.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.bytes for tensor in export.tensors), shutil.disk_usage(output.parent).free
    if needed > free:
        raise OSError(f"{output} needs {needed / 1e9:.2f} GB and {output.parent} has {free / 1e9:.2f} GB free")
    if output.suffix == ".safetensors":
        return [_write_file(output, export.tensors, export.metadata)]
    return _write_folder(output, export, shard_bytes)


def parse_bytes(text: str) -> int:
    """A size such as 5GB or 200MB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B", text.strip())
    size = float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]] if match else 0.0
    if size < 1:
        raise ValueError(f"{text!r} is not a size; write for example 5GB or 200MB")
    return int(size)


def _refuse_to_overwrite(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if output.suffix == ".safetensors":
        if output.is_dir():
            raise ValueError(f"{output} is a folder; a name that ends in .safetensors is to be a file")
    elif not output.is_dir():
        raise ValueError(f"{output} is a file; name a folder, or a file that ends in .safetensors")
    else:
        foreign = sorted(path.name for path in output.iterdir() if not _OURS.fullmatch(path.name))
        if foreign:
            raise ValueError(
                f"{output} holds what no export writes ({', '.join(foreign[:3])}) and is left alone; name a new folder"
            )
        if not any(output.iterdir()):
            return
    if not force:
        raise ValueError(f"{output} exists; --force replaces it")


def _write_folder(output: Path, export: Export, shard_bytes: int) -> list[WrittenFile]:
    for leftover in output.parent.glob(f".{output.name}.????????{PARTIAL}"):  # of writers that were killed
        shutil.rmtree(leftover)
    staging = _partial_folder(output)
    staging.mkdir()
    try:
        written = list(_write_shards(staging, export, shard_bytes))
        if export.diffusers_config is not None:
            write_file(staging / "config.json", json.dumps(export.diffusers_config, indent=2).encode() + b"\n")
        _replace(output, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [file._replace(path=output / file.path.name) for file in written]


def _write_shards(folder: Path, export: Export, shard_bytes: int) -> Iterator[WrittenFile]:
    stem, shards = STEMS[export.layout], split(export.tensors, shard_bytes)
    if len(shards) == 1:
        yield _write_file(folder / f"{stem}.safetensors", shards[0], export.metadata)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        yield _write_file(folder / name, shard, export.metadata)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.bytes for tensor in export.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_file(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2).encode() + b"\n")


def split(tensors: Sequence[ExportedTensor], shard_bytes: int) -> list[list[ExportedTensor]]:
    """Runs of tensors of at most `shard_bytes` each; a larger tensor gets a shard of its own."""
    shards: list[list[ExportedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_file(path: Path, tensors: Sequence[ExportedTensor], metadata: Mapping[str, str]) -> WrittenFile:
    described = {tensor.name: Described(tensor.info.dtype, tensor.info.shape) for tensor in tensors}
    digest = hashlib.sha256()
    with new_file(path) as file:

        def write(data: memoryview) -> None:
            file.write(data)
            digest.update(data)

        size = write_streamed(write, described, (tensor.read() for tensor in tensors), metadata)
    return WrittenFile(path, size, digest.hexdigest())


def _replace(output: Path, staging: Path) -> None:
    """Gives the staged folder its name; a former one stays whole until then."""
    sync(staging)
    former = _partial_folder(output)
    if output.exists():
        os.rename(output, former)
    os.rename(staging, output)
    sync(output.parent)
    shutil.rmtree(former, ignore_errors=True)


def _partial_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.{secrets.token_hex(4)}{PARTIAL}")
