"""Whether the nodes see the same folder, and whether a rename there is one step, as checkpoints need it."""

import os
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.doctor_node import existing

if TYPE_CHECKING:
    from launch.doctor_network import Meeting

SEEN_S = 5.0  # that a network file system may take to show what another node wrote


def try_folder(meeting: "Meeting", folder: str) -> tuple[str, str]:
    """What is wrong with sharing and with renaming; for one process of each node."""
    first = meeting.rank == meeting.leaders[0]
    made = _make_nonce(folder) if first else None
    path, nonce, error = meeting.exchange("folder", made, meeting.leaders)[meeting.leaders[0]]
    if error:
        return error, ""
    place = Path(path)
    shared_error = _see(place / "nonce", nonce)
    rename_error = "" if shared_error else try_rename(place, f"rank-{meeting.rank}", nonce)
    try:
        wrote = meeting.exchange("wrote", not (shared_error or rename_error), meeting.leaders)
        for rank, there in wrote.items() if first else ():
            shared_error = shared_error or (_see(place / f"rank-{rank}", nonce) if there else "")
    finally:
        if first:
            shutil.rmtree(place, ignore_errors=True)
    return shared_error, rename_error


def try_alone(folder: str) -> str:
    """What is wrong with the folder of a single machine."""
    path, nonce, error = _make_nonce(folder)
    if error:
        return error
    try:
        return try_rename(Path(path), "rank-0", nonce)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def try_rename(folder: Path, name: str, content: str) -> str:
    """What goes wrong when a file takes the place of another, as every save does it."""
    target, partial = folder / name, folder / f".{name}.tmp"
    try:
        target.write_text("before")
        with open(partial, "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, target)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        found = target.read_text()
    except OSError as error:
        return f"{folder}: {error}"
    if found != content or partial.exists():
        return f"{target} holds {found[:40]!r} after another file was renamed to it"
    return ""


def _make_nonce(folder: str) -> tuple[str, str, str]:
    """A new folder with a file of random letters: path, letters, error."""
    nonce = secrets.token_hex(16)
    place = existing(folder) / f".fw-doctor-{nonce[:8]}"  # what does not exist is made by the run
    try:
        place.mkdir()
        (place / "nonce").write_text(nonce)
    except OSError as error:
        return "", "", f"{place.parent} cannot be written: {error}"
    return str(place), nonce, ""


def _see(path: Path, content: str) -> str:
    """Waits until a file is there with its content."""
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            found = path.read_text()
            error = "" if found == content else f"{path} holds something else here"
        except OSError as reason:
            error = f"{path}: {reason.strerror}"
        if not error or time.monotonic() > deadline:
            return error
        time.sleep(0.1)
