"""The folder of a run: one owner at a time, and what became of the run.

Ownership is a chain of files `.lease/1`, `.lease/2`, ...; the last one names the owner. Creating the next is atomic on every file
system, NFS included, so of many newcomers one wins, and an owner that was given up and wakes again cannot write over its
successor. The owner counts on in its file; others watch that count with their own clock, for clocks and mtimes differ among hosts.
"""

import json
import logging
import os
import secrets
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from fw_train.atomic_files import new_file, replace_file
from fw_train.identity import Process, process_from_json, state, this_process

log = logging.getLogger(__name__)

RENEW_S = 2.0
STALE_S = 30.0  # an owner on another machine that has not counted for so long has gone
ENDING_S = 2.0  # an owner on this machine may be about to end: killed processes take a moment to go
LOOK_S = 0.2

State = Literal["running", "stopped", "finished", "failed"]


class RunFolderBusy(RuntimeError):
    """Another process trains in this folder."""


class Status(NamedTuple):
    state: State
    step: int
    reason: str


class Lease(NamedTuple):
    token: str
    owner: Process
    since: str  # for people: no decision rests on it
    renewals: int
    released: bool


class RunFolder:
    """Held by rank 0 for as long as the run lives; `token` tells this start apart from every other."""

    def __init__(self, path: Path, number: int, lease: Lease) -> None:
        self.path, self.token = path, lease.token
        self._number, self._lease = number, lease
        self._done = threading.Event()
        self._writing = threading.Lock()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    @classmethod
    def claim(cls, path: Path) -> "RunFolder":
        """The folder as this process's own, created where it is missing; RunFolderBusy while its owner lives."""
        path = Path(path)
        (path / ".lease").mkdir(parents=True, exist_ok=True)
        here = this_process()
        while True:
            number = _last(path)
            if number:
                _await_end(path, number, here)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            lease = Lease(secrets.token_hex(8), here, since, 0, released=False)
            if _create(_file(path, number + 1), lease):
                return cls(path, number + 1, lease)

    def still_mine(self) -> bool:
        """Whether nobody has taken the folder over; a writer that has lost it must stop."""
        if _file(self.path, self._number + 1).exists():
            return False
        lease = _read(_file(self.path, self._number))[0]
        return lease is not None and lease.token == self.token

    def status(self, state: State, step: int, reason: str) -> None:
        """Says in `status.json` what became of the run; a full disk is only warned about."""
        write_status(self.path, self.token, Status(state, step, reason))

    def release(self) -> None:
        """Lets the next start have the folder at once."""
        self._done.set()
        self._renewer.join(RENEW_S)
        self._publish(released=True)

    def _renew(self) -> None:
        while not self._done.wait(RENEW_S):
            self._publish(released=False)

    def _publish(self, released: bool) -> None:
        with self._writing:
            self._lease = self._lease._replace(renewals=self._lease.renewals + 1, released=released)
            try:
                if self.still_mine():
                    replace_file(_file(self.path, self._number), json.dumps(self._lease).encode())
                elif not released:
                    log.error("%s was taken over by another start; this one must stop", self.path)
                    self._done.set()
            except OSError as error:
                log.warning("the lease on %s could not be renewed: %s", self.path, error)


def read_status(path: Path) -> Status | None:
    """What the run in a folder said last; None: it has said nothing."""
    file = Path(path) / "status.json"
    try:
        tree = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{file} is not readable: {error}; remove it if the run has ended") from None
    if not isinstance(tree, dict) or tree.get("state") not in get_args(State):
        raise ValueError(
            f"{file} does not hold a state of {', '.join(get_args(State))}; remove it if the run has ended"
        )
    return Status(tree["state"], int(tree["step"]), str(tree["reason"]))


def write_status(path: Path, token: str | None, status: Status) -> None:
    """Replaces `status.json` for the start that owns the folder with this token; any rank may (None: without a lease)."""
    data = json.dumps(status._asdict(), indent=1).encode() + b"\n"
    try:
        if token != current_token(path):
            log.error("%s belongs to another start now; '%s' is not written there", path, status.state)
            return
        with new_file(path / "status.json") as file:
            file.write(data)
    except OSError as error:
        log.warning(
            "status.json of %s could not be written ('%s', step %d): %s", path, status.state, status.step, error
        )


def current_token(path: Path) -> str | None:
    """The token of the last start that claimed this folder."""
    lease = _read(_file(path, number))[0] if (number := _last(path)) else None
    return lease.token if lease else None


def refusal(path: Path) -> str | None:
    """Why a claim of this folder would be refused now, found without claiming it; None: it would not be."""
    number = _last(path)
    try:
        if number:
            _await_end(path, number, this_process())
    except RunFolderBusy as error:
        return str(error)
    return None


def _await_end(path: Path, number: int, here: Process) -> None:
    """Returns once the owner is known to be gone; RunFolderBusy as soon as it is known to live."""
    file = _file(path, number)
    lease, first = _read(file)
    data, began = first, time.monotonic()
    while not (lease and lease.released):
        owner = str(lease.owner) if lease else "an owner whose lease is unreadable"
        known = state(lease.owner, here) if lease else None
        if known == "gone":
            log.warning("%s was left by %s, which has ended; taking it over", path, owner)
            return
        waited_s = time.monotonic() - began
        if (data != first) if known is None else (waited_s > ENDING_S):
            raise RunFolderBusy(_busy(path, lease))
        if waited_s > STALE_S:
            log.warning("%s: %s has not renewed its lease for %.0f s; taking it over", path, owner, STALE_S)
            return
        time.sleep(LOOK_S)
        lease, data = _read(file)


def _busy(path: Path, lease: Lease | None) -> str:
    if lease is None:
        return f"{path} is being claimed by another process this very moment; choose another run.output, or try again"
    return (
        f"{path} is in use by {lease.owner} since {lease.since}; choose another run.output, or stop that run first "
        f"(kill -TERM {lease.owner.pid} on {lease.owner.host}, or `touch {path / 'stop'}`) and start again"
    )


def _file(path: Path, number: int) -> Path:
    return path / ".lease" / str(number)


def _last(path: Path) -> int:
    """The number of the newest lease; 0: there is none. Leases are never removed, so none can be handed out twice."""
    try:
        return max((int(name) for name in os.listdir(path / ".lease") if name.isdecimal()), default=0)
    except FileNotFoundError:
        return 0


def _create(file: Path, lease: Lease) -> bool:
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as out:
        out.write(json.dumps(lease).encode())
    return True


def _read(file: Path) -> tuple[Lease | None, bytes]:
    """A lease and its bytes; the lease is None while it is being written, or damaged."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None, b""
    try:
        return _lease(json.loads(data)), data
    except (ValueError, TypeError):
        return None, data


def _lease(tree: Any) -> Lease:
    token, owner, since, renewals, released = tree
    return Lease(str(token), process_from_json(owner), str(since), int(renewals), bool(released))
