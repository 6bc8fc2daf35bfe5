"""Finding encoders in a folder, and filling the libraries' modules with the tensors of the original files."""

import hashlib
import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fw_train.weights.files import CheckpointError, CheckpointReader, listing


def library(name: str) -> Any:
    """diffusers or transformers, imported when an encoder needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"encoding needs {name} ({error}); pip install 'fw-train[encode]'") from None


def find(folder: str | Path, what: str, subfolder: str, file: str) -> Path:
    """Where an encoder lies: a file of the original layout, or a subfolder of the diffusers layout; either may be named itself."""
    path = Path(folder)
    if path.is_file() or (path.name == subfolder and (path / "config.json").is_file()):
        return path
    if (path / file).is_file():
        return path / file
    if (path / subfolder / "config.json").is_file():
        return path / subfolder
    raise ValueError(
        f"{path} holds no {what}: neither {file} (original layout) nor {subfolder}/config.json (diffusers layout); "
        "give the folder of a Wan model"
    )


def from_diffusers(library_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A module from a folder of the diffusers layout; nothing is downloaded, and no pickle is read."""
    try:
        return library_class.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}; fetch it again"
        ) from None


def renamed(reader: CheckpointReader, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The tensors under new names; those whose new name is None are left out."""
    names = {key: rename(key) for key in reader.shapes()}
    return {name: reader.tensor(key) for key, name in names.items() if name is not None}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, where: Path) -> nn.Module:
    """Gives a module exactly these tensors, in this dtype."""
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    shaped = [name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape]
    if missing or unknown or shaped:
        problems = {"missing": missing, "unknown": unknown, "of another shape": shaped}
        text = "; ".join(f"{what}: {listing(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"{where} is not what its name says: {text}; fetch it again")
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return module


def substitute(rules: Mapping[str, str], name: str) -> str | None:
    """The name after the first rule (a regular expression for all of it) that fits; None where none does."""
    for pattern, replacement in rules.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def shape(reader: CheckpointReader, name: str) -> tuple[int, ...]:
    """The shape of a tensor that has to be there."""
    shapes = reader.shapes()
    if name not in shapes:
        raise CheckpointError(f"{reader.path} holds no `{name}`: it is not what its name says; fetch it again")
    return shapes[name].shape


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of all tensors, whatever their names: both layouts, and every version of the libraries, give the same."""
    hashes = set()
    for tensor in module.state_dict().values():
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        hashes.add(digest.hexdigest())
    return hashlib.sha256(" ".join(sorted(hashes)).encode()).hexdigest()
