"""Loading a checkpoint onto any number of ranks, and verifying one whole.

state = load(output, "latest", engine.fragments(), world)       # None: there is no checkpoint yet
engine.restore(state.optimiser_steps, state.scaler_state)
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from fw_train.checkpoint.fragments import (
    CHUNK_BYTES,
    Piece,
    checked_pieces,
    coverage_problems,
    damaged_ranges,
    fill,
    mismatches,
    plan_reads,
    read_index,
)
from fw_train.checkpoint.layout import (
    MANIFEST,
    Checkpoint,
    checkpoints_folder,
    folder_name,
    list_checkpoints,
    open_checkpoint_folder,
    read_manifest,
    scan,
)
from fw_train.checkpoint.run_state import RunState
from fw_train.dist import World, gather_texts
from fw_train.engine.base import Fragment
from fw_train.weights.files import CheckpointError, listing

log = logging.getLogger(__name__)

REMEDY = "set run.resume=auto to go on from the latest whole checkpoint before it, or restore the file"

__all__ = ["CheckpointError", "list_checkpoints", "load", "peek", "verify_checkpoint"]


def peek(output: Path, which: int | str) -> Checkpoint | None:
    """The checkpoint that `load` tries first; its manifest holds the configuration to compare with. All ranks together.

    A host may not see yet what another one has just written: what rank 0 sees counts.
    """
    name, problem = "", ""
    try:
        name = next((checkpoint.path.name for checkpoint in _candidates(output, which)), "")
    except (CheckpointError, OSError) as error:
        problem = str(error)
    name, problem = json.loads(gather_texts(json.dumps([name, problem]))[0])
    if problem:
        raise CheckpointError(problem)
    path = checkpoints_folder(output) / name
    return Checkpoint(path, read_manifest(path / MANIFEST)) if name else None


def load(output: Path, which: int | str, fragments: Sequence[Fragment], world: World) -> RunState | None:
    """Fills the views from step `which`, the "latest" save, or with "auto" the latest that is whole; all ranks together.

    All ranks load the same one. A damaged one is refused, and with "auto" given up for the one before it, with a warning.
    Nothing is overwritten before headers, coverage and shapes have been checked. None: the run has no checkpoint.
    """
    here = checked_pieces(fragments)
    everywhere = [Piece(*entry) for text in gather_texts(json.dumps(here)) for entry in json.loads(text)]
    live = [piece._replace(shape=tuple(piece.shape)) for piece in everywhere]
    problems = coverage_problems(live)
    if problems:
        raise CheckpointError(f"the ranks' fragments do not make up the parameters: {listing(problems)}")
    paths = _agreed_candidates(output, which, world)
    for path in paths:
        problem, state = _load_one(path, fragments, here, live, world)
        if state is not None:
            log.info("loaded %s, saved on %d ranks", path, state.world_size)
            return state
        if which != "auto":
            raise CheckpointError(f"{problem}. {REMEDY}")
        log.warning("GIVING UP the checkpoint %s, which is damaged: %s", path, problem)
    if paths:
        raise CheckpointError(
            f"all {len(paths)} checkpoints in {checkpoints_folder(output)} are damaged; the last: {problem}"
        )
    return None


def verify_checkpoint(path: Path) -> list[str]:
    """Reads every byte of a checkpoint and of its step-N.safetensors; what is damaged, by file and byte range."""
    try:
        checkpoint = open_checkpoint_folder(path)
    except CheckpointError as error:
        return [str(error)]
    manifest, problems = checkpoint.manifest, list[str]()
    pieces: list[Piece] = []
    for rank in range(manifest.state["world_size"]):
        try:
            pieces += read_index(checkpoint, rank).pieces
            problems += damaged_ranges(checkpoint, rank)
        except CheckpointError as error:
            problems.append(str(error))
    problems = problems or coverage_problems(pieces)
    if manifest.weights is not None:
        weights = path.parent.parent / manifest.weights.name
        if not weights.exists():
            problems.append(f"{weights} is missing")
        else:
            digest = hashlib.sha256()
            with open(weights, "rb") as file:
                while data := file.read(CHUNK_BYTES):
                    digest.update(data)
            if digest.hexdigest() != manifest.weights.sha256:
                problems.append(f"{weights} is not what was committed with {path.name} (SHA-256 differs)")
    return problems


def _candidates(output: Path, which: int | str) -> list[Checkpoint]:
    """The checkpoints to try, in order; an error where what was asked for is not there or is damaged."""
    folder = checkpoints_folder(output)
    found = scan(folder)
    if which == "auto":
        for damaged in found.damaged:
            log.warning("GIVING UP the checkpoint %s, which is damaged: %s", damaged.path, damaged.reason)
        if found.damaged and not found.checkpoints:
            raise CheckpointError(f"{folder}: no checkpoint is whole: {listing(d.reason for d in found.damaged)}")
        return found.checkpoints
    if which == "latest":
        newest = found.checkpoints[0].step if found.checkpoints else -1
        for damaged in found.damaged:
            if damaged.step > newest:
                raise CheckpointError(f"{damaged.reason}. {REMEDY}")
        return found.checkpoints[:1]
    for checkpoint in found.checkpoints:
        if checkpoint.step == which:
            return [checkpoint]
    for damaged in found.damaged:
        if damaged.step == which:
            raise CheckpointError(f"{damaged.reason}. {REMEDY}")
    there = listing(str(checkpoint.step) for checkpoint in found.checkpoints)
    raise CheckpointError(f"{folder / folder_name(int(which))} does not exist; there are the steps {there}")


def _agreed_candidates(output: Path, which: int | str, world: World) -> list[Path]:
    """What rank 0 finds, on all ranks."""
    names, problem = [], ""
    if world.rank == 0:
        try:
            names = [checkpoint.path.name for checkpoint in _candidates(output, which)]
        except (CheckpointError, OSError) as error:
            problem = str(error)
    names, problem = json.loads(gather_texts(json.dumps([names, problem]))[0])
    if problem:
        raise CheckpointError(problem)
    return [checkpoints_folder(output) / name for name in names]


def _load_one(
    path: Path, fragments: Sequence[Fragment], here: Sequence[Piece], live: Sequence[Piece], world: World
) -> tuple[str, RunState | None]:
    """The state, or the same problem on all ranks."""
    seal, problem, indexes = "", "", []
    try:
        checkpoint = Checkpoint(path, read_manifest(path / MANIFEST))
        seal = checkpoint.manifest.seal
        indexes = [read_index(checkpoint, rank) for rank in range(checkpoint.manifest.state["world_size"])]
        saved = [piece for index in indexes for piece in index.pieces]
        gaps = coverage_problems(saved)
        if gaps:
            raise CheckpointError(f"{path}: the ranks' files do not make up the parameters: {listing(gaps)}")
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problem = _agreed(problem, seal)
    if problem:
        return problem, None
    misfits = mismatches(saved, live)
    if misfits:
        raise CheckpointError(f"{path} does not belong to this network: {'; '.join(misfits)}")
    try:
        fill(checkpoint, indexes, fragments, plan_reads(indexes, here))
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problem = _agreed(problem, seal)
    if problem:
        return problem, None
    same_world = world.size == len(indexes)
    return "", checkpoint.manifest.run_state(indexes[world.rank].rng if same_world else None)


def _agreed(problem: str, seal: str) -> str:
    """The first problem that any rank has; one, too, where ranks have read different manifests."""
    reports = [json.loads(text) for text in gather_texts(json.dumps([problem, seal]))]
    for rank, (text, _) in enumerate(reports):
        if text:
            return f"{text} (seen by rank {rank})" if len(reports) > 1 else text
    return "" if len({seal for _, seal in reports}) == 1 else "the ranks see different manifests"
