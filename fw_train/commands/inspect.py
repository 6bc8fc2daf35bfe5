"""Say what weights, checkpoints and runs hold: metadata, modules, dtypes, parameters, hashes, and whether they are whole.

    fw inspect outputs/stage1/step-20000.safetensors --keys
    fw inspect models/Wan2.1-Fun-V1.1-1.3B-Control-Camera
    fw inspect outputs/stage1/checkpoints/step-20000
    fw inspect outputs/stage1 --json

Paths are files of weights, Wan or diffusers folders, checkpoints to resume from (every byte is read and compared with the
manifest) and folders of runs (all of their checkpoints, and which is the newest good one). Exit code 1: something is damaged
or not readable; it is named.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fw_train.data.sidecar_files import fingerprint
from fw_train.inspection import Run, SavedState, Weights, inspect_path
from fw_train.weights.files import TensorInfo
from fw_train.weights.stage import ENCODINGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="weights, a checkpoint, or a run's folder")
    parser.add_argument("--keys", action="store_true", help="list every tensor, not modules alone")
    parser.add_argument("--no-hash", action="store_true", help="read headers alone, not whole files of weights")
    parser.add_argument("--json", action="store_true", help="a JSON list with an entry for each path")


def run(args: argparse.Namespace) -> int:
    bad, entries = False, []
    for path in args.paths:
        try:
            found = inspect_path(path, hashes=not args.no_hash)
        except (ValueError, OSError) as error:
            print(f"fw inspect: {error}", file=sys.stderr)
            entries.append({"path": str(path), "error": str(error)})
            bad = True
            continue
        entries.append(as_tree(found, args.keys))
        bad = bad or is_damaged(found)
        if not args.json:
            print("\n".join(lines(found, args.keys)), end="\n\n" if path != args.paths[-1] else "\n")
    if args.json:
        print(json.dumps(entries, indent=1))
    return int(bad)


def is_damaged(found: Weights | SavedState | Run) -> bool:
    if isinstance(found, Run):
        return any(saved.damage for saved in found.checkpoints)
    return isinstance(found, SavedState) and bool(found.damage)


def as_tree(found: Weights | SavedState | Run, keys: bool) -> dict[str, Any]:
    """Plain mappings and lists, for JSON."""
    tree = found._asdict()
    if isinstance(found, Weights):
        tree["modules"] = [row._asdict() for row in found.modules]
        tree["files"] = [file._asdict() for file in found.files]
        tree["parameters"] = sum(row.parameters for row in found.modules)
        if keys:
            tree["keys"] = {key: {"shape": info.shape, "dtype": _dtype(info)} for key, info in found.keys.items()}
        else:
            del tree["keys"]
    elif isinstance(found, Run):
        tree["checkpoints"] = [saved._asdict() for saved in found.checkpoints]
    return tree


def lines(found: Weights | SavedState | Run, keys: bool) -> Iterator[str]:
    if isinstance(found, Weights):
        yield from _weights_lines(found, keys)
    elif isinstance(found, SavedState):
        yield from _saved_lines(found)
    else:
        yield f"{found.path}: run, {found.state}"
        for saved in found.checkpoints:
            yield from _saved_lines(saved)
        yield f"newest good checkpoint: {found.newest_good or 'none'}"
        yield f"trained weights: {', '.join(found.weights) or 'none'}"


def _weights_lines(found: Weights, keys: bool) -> Iterator[str]:
    yield f"{found.path}: {found.kind}"
    for name, text in found.metadata.items():
        if name != ENCODINGS:
            yield f"  {name:<14}{text}"
    for kind, facts in sorted((found.encodings or {}).items()):
        told = ", ".join(f"{name}: {value!r:.40}" for name, value in sorted(facts.items()))
        yield f"  {kind:<14}{fingerprint(facts)[:16]}  {told}"
    if found.base_hash:
        yield f"  {'hash as base':<14}{found.base_hash}"
    for file in found.files:
        yield f"  {'sha256':<14}{file.sha256 or 'not taken'}  {file.size:,} bytes  {file.path}"
    total = sum(row.parameters for row in found.modules)
    size = sum(row.bytes for row in found.modules)
    yield f"  {'module':<40}{'tensors':>8}{'parameters':>16}{'bytes':>16}  dtype"
    for row in found.modules:
        yield f"  {row.module:<40}{row.tensors:>8}{row.parameters:>16,}{row.bytes:>16,}  {', '.join(row.dtypes)}"
    yield f"  {'total':<40}{len(found.keys):>8}{total:>16,}{size:>16,}"
    if keys:
        width = max(map(len, found.keys), default=0)
        for key, info in found.keys.items():
            yield f"  {key:<{width}}  {_dtype(info):<10}{list(info.shape)}"


def _saved_lines(saved: SavedState) -> Iterator[str]:
    yield f"{saved.path}: {'DAMAGED' if saved.damage else 'whole'}, {saved.bytes:,} bytes"
    for name, value in saved.facts.items():
        yield f"  {name:<16}{value}"
    for text in saved.damage:
        yield f"  damage          {text}"


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")
