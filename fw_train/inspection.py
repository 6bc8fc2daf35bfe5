"""What is at a path: weights of any kind, a resumable checkpoint, or a run; read, hashed and verified."""

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fw_train.checkpoint.layout import MANIFEST, checkpoints_folder, open_checkpoint_folder, scan
from fw_train.checkpoint.loading import verify_checkpoint
from fw_train.run.folder import read_status
from fw_train.weights.base_hash import base_hash
from fw_train.weights.files import CheckpointError, CheckpointReader, TensorInfo, open_checkpoint
from fw_train.weights.stage import stored_encodings
from fw_train.weights.wan import PATCH_WEIGHT, map_names


class ModuleRow(NamedTuple):
    """Tensors of a module; numbered ones such as blocks together."""

    module: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: list[str]


class FileHash(NamedTuple):
    path: str
    size: int
    sha256: str | None


class Weights(NamedTuple):
    kind: str
    path: str
    metadata: dict[str, str]
    encodings: dict[str, dict[str, Any]] | None  # of trained weights: what encoded their data, by kind
    modules: list[ModuleRow]
    keys: dict[str, TensorInfo]
    files: list[FileHash]
    base_hash: str | None  # of a Wan transformer


class SavedState(NamedTuple):
    """A resumable checkpoint, every byte of which has been read."""

    path: str
    step: int | None
    facts: dict[str, Any]
    bytes: int
    damage: list[str]


class Run(NamedTuple):
    path: str
    state: str  # of its status.json
    checkpoints: list[SavedState]  # latest save first
    newest_good: str | None
    weights: list[str]  # its step-N.safetensors


def inspect_path(path: Path, hashes: bool = True) -> Weights | SavedState | Run:
    """What the path holds; an error where it holds nothing that this project reads."""
    named_so = re.fullmatch(r"(\.replaced-)?step-\d+(\.[0-9a-f]+)?", path.name)
    if path.is_dir() and (named_so or (path / MANIFEST).is_file()):
        return inspect_saved(path)
    if path.is_dir() and (checkpoints_folder(path).is_dir() or (path / "status.json").is_file()):
        return inspect_run(path)
    return inspect_weights(path, hashes)


def inspect_weights(path: Path, hashes: bool) -> Weights:
    reader = open_checkpoint(path)
    keys = reader.shapes()
    wan = PATCH_WEIGHT in map_names(keys).file_keys
    return Weights(
        _kind(reader, wan),
        str(reader.path),
        reader.metadata,
        stored_encodings(reader),
        modules(keys),
        keys,
        [FileHash(stamp.path, stamp.size, sha256(Path(stamp.path)) if hashes else None) for stamp in reader.files],
        base_hash(reader) if wan and hashes else None,
    )


def inspect_saved(path: Path) -> SavedState:
    damage = verify_checkpoint(path)
    try:
        manifest = open_checkpoint_folder(path).manifest
    except CheckpointError:
        return SavedState(str(path), None, {}, 0, damage)
    state = manifest.state
    facts = {
        "saved on": f"{state['world_size']} ranks",
        "save number": manifest.save_number,
        "optimiser steps": state["optimiser_steps"],
        "global batch": state["segments"][-1][1],
        "stage": state["config"].get("train", {}).get("stage"),
        "base hash": state["base_hash"],
        "data": state["data_fingerprint"],
        "code": state["code_version"],
        "weights": manifest.weights.name if manifest.weights else None,
    }
    return SavedState(str(path), manifest.step, facts, sum(file.size for file in manifest.files), damage)


def inspect_run(path: Path) -> Run:
    found = scan(checkpoints_folder(path))
    saved = [inspect_saved(checkpoint.path) for checkpoint in found.checkpoints]
    newest = next((state.path for state in saved if not state.damage), None)
    saved += [SavedState(str(d.path), d.step, {}, 0, [d.reason]) for d in found.damaged]
    status = read_status(path)
    weights = sorted(path.glob("step-*.safetensors"), key=lambda file: (len(file.name), file.name))
    told = f"{status.state}, step {status.step}{f': {status.reason}' if status.reason else ''}" if status else "unknown"
    return Run(str(path), told, saved, newest, [file.name for file in weights])


def modules(keys: dict[str, TensorInfo]) -> list[ModuleRow]:
    """Rows in the order of the file; `blocks.0`, `blocks.1`, ... are one row `blocks.*`."""
    groups: dict[str, list[TensorInfo]] = {}
    for key, info in keys.items():
        groups.setdefault(module_of(key), []).append(info)
    return [
        ModuleRow(
            name,
            len(infos),
            sum(math.prod(info.shape) for info in infos),
            sum(math.prod(info.shape) * info.dtype.itemsize for info in infos),
            _dtypes(infos),
        )
        for name, infos in groups.items()
    ]


def module_of(key: str) -> str:
    """The module that a tensor is counted with: the first part of its name behind prefixes, entries of lists as one."""
    match = re.match(r"((?:geometry\.|condition_embedder\.)?[^.]+)(\.\d+\.)?", key)
    return key if match is None else match[1] + (".*" if match[2] else "")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(reader: CheckpointReader, wan: bool) -> str:
    facts, layout = reader.metadata, map_names(reader.shapes()).layout
    if facts.get("format", "").startswith("fw_train.weights.stage"):
        return f"trained weights of {facts.get('stage')}, step {facts.get('step')}"
    if facts.get("format", "").startswith("fw_train.export.tensors"):
        return f"export, {facts.get('contents')}, of {facts.get('stage')}, step {facts.get('step')}, {layout} names"
    return f"Wan transformer, {layout} names" if wan else "weights"


def _dtypes(infos: Iterable[TensorInfo]) -> list[str]:
    return sorted({str(info.dtype).removeprefix("torch.") for info in infos})
