"""The identity of base weights: a hash of what they are, whatever files and names they come in."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from fw_train.atomic_files import write_file
from fw_train.weights.files import CheckpointReader, open_checkpoint
from fw_train.weights.wan import map_names

log = logging.getLogger(__name__)

CACHE_FORMAT = "fw_train.weights.base_hash.v1"  # new whenever the same weights would get another hash


def base_hash(checkpoint: CheckpointReader | str | Path, cached: bool = True) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, sorted by original name.

    One tensor is in memory at a time. With `cached` the result is kept in the user's cache folder until a file changes.
    """
    reader = checkpoint if isinstance(checkpoint, CheckpointReader) else open_checkpoint(checkpoint)
    known = known_base_hash(reader) if cached else None
    if known is not None:
        return known
    digest = _digest(reader)
    if cached:
        _remember(cache_path(), *_cache_key(reader), digest)
    return digest


def known_base_hash(checkpoint: CheckpointReader | str | Path) -> str | None:
    """The hash of a checkpoint that was hashed before and has not changed since; no weights are read."""
    reader = checkpoint if isinstance(checkpoint, CheckpointReader) else open_checkpoint(checkpoint)
    place, stamps = _cache_key(reader)
    known = _read_cache(cache_path()).get(place)
    if isinstance(known, dict) and known.get("files") == stamps and _is_hash(known.get("sha256")):
        return known["sha256"]
    return None


def _cache_key(reader: CheckpointReader) -> tuple[str, list[list[Any]]]:
    """Where a checkpoint lies, and the stamps of its files."""
    return os.path.realpath(reader.path), [list(stamp) for stamp in reader.files]


def cache_path() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG specification.
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "fw_train" / "base_hash.json"


def _digest(reader: CheckpointReader) -> str:
    digest, shapes = hashlib.sha256(), reader.shapes()
    for name, key in sorted(map_names(shapes).file_keys.items()):
        shape, dtype = shapes[key]
        digest.update(json.dumps([name, str(dtype).removeprefix("torch."), list(shape)]).encode() + b"\n")
        digest.update(reader.tensor(key).flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        cache = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("the cache of base hashes %s is not readable (%s) and is made anew", path, error)
        return {}
    if not isinstance(cache, dict) or cache.get("format") != CACHE_FORMAT or not isinstance(cache.get("hashes"), dict):
        log.warning("the cache of base hashes %s is not one of %s and is made anew", path, CACHE_FORMAT)
        return {}
    return cache["hashes"]


def _remember(path: Path, place: str, stamps: list[list[Any]], digest: str) -> None:
    entry = {"files": stamps, "sha256": digest}
    cache = {"format": CACHE_FORMAT, "hashes": {**_read_cache(path), place: entry}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(cache, indent=1).encode())
    except OSError as error:
        log.warning("the base hash of %s is not kept, %s is not writable: %s", place, path, error)


def _is_hash(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64
