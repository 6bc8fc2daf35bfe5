"""The folder of resumable checkpoints: names, the sealed manifest, and what a scan of the folder finds.

    checkpoints/step-N/manifest.json            what belongs to it: sizes, hashes, the run's state; sealed by its own hash
    checkpoints/step-N/rank-00000.safetensors   fp32 master weights and both moments of what rank 0 owned
    checkpoints/step-N/rank-00000.json          which pieces of which parameters these are, and the hashes of its chunks

Names that begin with a dot are unfinished or on their way out; only `.replaced-step-N.*` may still be loaded.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fw_train.checkpoint.run_state import RunState
from fw_train.data.strict_json import SchemaError, read_json
from fw_train.weights.files import CheckpointError

FORMAT = "fw_train.checkpoint.loading.v1"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_RANKS = 99_999
MAX_COUNT = 1 << 53  # of bytes, elements and steps: beyond, a number is nonsense

STAGING, REPLACED, TRASH = ".staging-", ".replaced-", ".trash-"
_LOADABLE = re.compile(r"(?:step-(?P<step>0|[1-9]\d{0,15})|\.replaced-step-(?P<replaced>0|[1-9]\d{0,15})\.[0-9a-f]+)")


class FileRecord(NamedTuple):
    """A file as it was committed."""

    name: str
    size: int
    sha256: str  # of the bytes; of a rank's data file: of its list of chunk hashes


@dataclass(frozen=True)
class Manifest:
    step: int
    save_number: (
        int  # counts the saves of the run, resumes included: the highest is the latest, whatever the clocks say
    )
    files: tuple[FileRecord, ...]
    weights: FileRecord | None  # the step-N.safetensors beside the checkpoints
    state: dict[str, Any]  # a RunState without the random generators, which the ranks' indexes hold
    seal: str = ""

    def run_state(self, rng: dict[str, Any] | None) -> RunState:
        segments = tuple((int(first), int(batch)) for first, batch in self.state["segments"])
        return RunState(**{**self.state, "segments": segments, "rng": rng})


class Checkpoint(NamedTuple):
    """A checkpoint whose manifest is sealed and whose files have their sizes."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


class Damaged(NamedTuple):
    path: Path
    step: int  # by its name
    reason: str


class Scan(NamedTuple):
    checkpoints: list[Checkpoint]  # latest save first
    damaged: list[Damaged]


def checkpoints_folder(output: Path) -> Path:
    return output / "checkpoints"


def folder_name(step: int) -> str:
    return f"step-{step}"


def weights_name(step: int | str) -> str:
    return f"step-{step}.safetensors"


def data_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def index_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def scan(folder: Path) -> Scan:
    """What can be loaded, and what should be but is damaged; reads manifests and sizes, no data and no times."""
    found, damaged = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        step = _step_of(path)
        if step is None:
            continue
        try:
            found.append(open_checkpoint_folder(path))
        except (CheckpointError, OSError) as error:
            damaged.append(Damaged(path, step, str(error)))
    found.sort(key=lambda checkpoint: checkpoint.manifest.save_number, reverse=True)
    # A damaged checkpoint that has been saved again is on its way out.
    current = {checkpoint.path.name for checkpoint in found}
    return Scan(found, [d for d in damaged if not (is_replaced(d.path) and folder_name(d.step) in current)])


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints that can be loaded, latest save first."""
    return scan(folder).checkpoints


def open_checkpoint_folder(path: Path) -> Checkpoint:
    """The manifest, checked against its seal, and the sizes of all files."""
    manifest = read_manifest(path / MANIFEST)
    if _step_of(path) != manifest.step:
        raise CheckpointError(f"{path} holds step {manifest.step}; folders of checkpoints keep their names")
    for record in manifest.files:
        file = path / record.name
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing") from None
        if size != record.size:
            raise CheckpointError(f"{file} has {size} bytes, {record.size} were committed: it is damaged")
    return Checkpoint(path, manifest)


def manifest_bytes(manifest: Manifest) -> bytes:
    payload = {
        "format": FORMAT,
        "step": manifest.step,
        "save_number": manifest.save_number,
        "files": [record._asdict() for record in manifest.files],
        "weights": manifest.weights._asdict() if manifest.weights else None,
        "state": manifest.state,
    }
    return _sealed(payload)


def state_tree(state: RunState) -> dict[str, Any]:
    """The run's state as the manifest holds it; an error where something in it is not JSON."""
    tree = asdict(state)
    del tree["rng"]
    try:
        return json.loads(json.dumps(tree, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the state of the run is not plain JSON ({error}): keep texts and finite numbers in it"
        ) from None


def read_manifest(path: Path) -> Manifest:
    """Reads strictly: any byte that differs from what was written is an error."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    try:
        if len(data) > MAX_MANIFEST_BYTES:
            raise SchemaError(f"more than {MAX_MANIFEST_BYTES} bytes")
        document = read_json(data, "it")
        payload = document["payload"]
        if data != _sealed(payload):
            raise SchemaError("its seal does not fit its contents")
        if payload["format"] != FORMAT:
            raise SchemaError(f"it has the format {payload['format']!r:.60}, this version reads {FORMAT}")
        return _manifest(payload, document["sha256"])
    except (SchemaError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} ({len(data)} bytes) is damaged: {_told(error)}") from None


def _manifest(payload: dict[str, Any], seal: str) -> Manifest:
    if set(payload) != {"format", "step", "save_number", "files", "weights", "state"}:
        raise SchemaError(f"its entries are {sorted(payload)!r:.200}")
    step, save_number, state = payload["step"], payload["save_number"], payload["state"]
    if not (is_count(step) and is_count(save_number)):
        raise SchemaError(f"step {step!r:.40} and save number {save_number!r:.40} are not counts")
    if not isinstance(state, dict) or set(state) != set(RunState.__dataclass_fields__) - {"rng"}:
        raise SchemaError("its state does not have the entries of this version")
    ranks = state["world_size"]
    if state["step"] != step or not is_count(ranks) or not 1 <= ranks <= MAX_RANKS:
        raise SchemaError(f"its state is of step {state['step']!r:.40} and {ranks!r:.40} ranks")
    files = tuple(_record(entry) for entry in payload["files"])
    expected = [name for rank in range(ranks) for name in (data_name(rank), index_name(rank))]
    if [record.name for record in files] != expected:
        raise SchemaError(f"its files are not those of {ranks} ranks")
    weights = _record(payload["weights"]) if payload["weights"] is not None else None
    if weights is not None and weights.name != weights_name(step):
        raise SchemaError(f"its weights are in {weights.name!r:.80}")
    return Manifest(step, save_number, files, weights, state, seal)


def _record(entry: Any) -> FileRecord:
    record = FileRecord(**entry)
    if not (isinstance(record.name, str) and is_count(record.size) and is_digest(record.sha256)):
        raise SchemaError(f"{entry!r:.120} is no record of a file")
    return record


def is_replaced(path: Path) -> bool:
    return path.name.startswith(REPLACED)


def _step_of(path: Path) -> int | None:
    named = _LOADABLE.fullmatch(path.name)
    return int(named["step"] or named["replaced"]) if named else None


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _sealed(payload: dict[str, Any]) -> bytes:
    text = json.dumps(payload, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"payload": payload, "sha256": digest}, indent=1, allow_nan=False).encode()


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, SchemaError) else f"{type(error).__name__} {error}"
