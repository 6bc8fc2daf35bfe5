"""`fw doctor --hostfile`: an agent on every node over ssh, all at once; a node that does not answer is a finding."""

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any, TypeVar

from launch.doctor_agent import FACTS, JOINED, NETWORK, STORE
from launch.doctor_facts import Asked, NetworkFacts, Node, NodeFacts, from_json
from launch.remote import ssh_options

R = TypeVar("R")

LOOK_S, MEET_S, NETWORK_S = 60.0, 10.0, 40.0  # together two minutes, meeting being two steps
TOLD = 400  # characters of what a node said last


class Silent(RuntimeError):
    """A node gave no answer; the message says what it said instead."""


class Line:
    """The connection to a node's agent."""

    def __init__(self, host: str, command: Sequence[str]) -> None:
        self.host = host
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._said: queue.Queue[str | None] = queue.Queue()
        self._last = ""  # of what is meant for people
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_answers, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def ask(self, message: Mapping[str, Any], mark: str, timeout_s: float) -> str:
        """The answer that begins with `mark`, without it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended: what it said stands in its output
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise Silent(f"no answer within {timeout_s:.0f} s{self._told()}") from None
            if line is None:
                self._readers[1].join(1.0)
                code = self._process.wait()
                raise Silent(f"{'ssh failed' if code == 255 else f'its agent ended with code {code}'}{self._told()}")
            if line.startswith(mark):
                return line.removeprefix(mark).rstrip("\n")

    def close(self) -> None:
        """The agent ends when it hears nobody any more."""
        self._process.terminate()
        self._process.wait()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last = (self._last + line)[-TOLD:]

    def _told(self) -> str:
        """Its last line, which says what went wrong, or what it was at."""
        lines = self._last.strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def ask_hosts(asked: Asked, environment: Mapping[str, str], ssh_port: int | None) -> list[Node]:
    """The facts of `asked.hosts`, and what those who answered saw of each other; ranks would meet on the first."""
    hosts, port = asked.hosts, asked.port
    assert port is not None
    with ExitStack() as stack:
        lines = []
        for host in hosts:
            lines.append(Line(host, agent_command(host, environment, ssh_port)))
            stack.callback(lines[-1].close)
        looks = [asked if host == hosts[0] else replace(asked, port=None) for host in hosts]
        nodes = dict(zip(hosts, _all(_facts, lines, looks), strict=True))
        _meet([line for line in lines if nodes[line.host].facts], nodes, port)
        return list(nodes.values())


def agent_command(host: str, environment: Mapping[str, str], ssh_port: int | None = None) -> list[str]:
    """What starts the agent: the same folder, interpreter and variables as here; every word is quoted for the far shell."""
    words = ["env", *(f"{name}={value}" for name, value in environment.items())]
    words += [sys.executable, "-m", "launch.doctor_agent"]
    return [
        "ssh",
        *ssh_options(ssh_port),
        "-T",
        "--",
        host,
        f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}",
    ]


def _facts(line: Line, asked: Asked) -> Node:
    try:
        return Node(line.host, from_json(NodeFacts, line.ask({"look": asdict(asked)}, FACTS, LOOK_S)))
    except Silent as silent:
        return Node(line.host, trouble=str(silent))


def _meet(lines: Sequence[Line], nodes: dict[str, Node], port: int) -> None:
    """Adds what the nodes see of each other."""
    if not lines:
        return
    first, *others = lines
    try:
        opened = int(first.ask({"open": port}, STORE, MEET_S))
    except Silent as silent:
        _set_trouble(nodes, first.host, f"it opened no meeting point: {silent}")
        return
    came = [first]
    place = {"address": first.host, "port": opened}
    for line, trouble in zip(others, _all(lambda line, _: _join(line, place), others, others), strict=True):
        if trouble:
            _set_trouble(nodes, line.host, f"cannot reach {first.host}:{opened}, where ranks meet: {trouble}")
        else:
            came.append(line)
    ranks = list(range(len(came)))
    found_all = _all(lambda line, rank: _network(line, rank, len(came)), came, ranks)
    for line, rank, found in zip(came, ranks, found_all, strict=True):
        nodes[line.host] = replace(nodes[line.host], rank=rank, network=found)


def _join(line: Line, place: Mapping[str, Any]) -> str:
    try:
        return line.ask(place, JOINED, MEET_S)
    except Silent as silent:
        return str(silent)


def _network(line: Line, rank: int, ranks: int) -> NetworkFacts:
    try:
        return from_json(NetworkFacts, line.ask({"rank": rank, "ranks": ranks}, NETWORK, NETWORK_S))
    except Silent as silent:
        return NetworkFacts(rank, "", trouble=str(silent))


def _set_trouble(nodes: dict[str, Node], host: str, trouble: str) -> None:
    nodes[host] = replace(nodes[host], network=NetworkFacts(-1, "", trouble=trouble))


def _all(work: Callable[[Line, Any], R], lines: Sequence[Line], arguments: Sequence[Any]) -> list[R]:
    """The same for all nodes at once; nodes have to be slow together, not one after the other."""
    with ThreadPoolExecutor(max(1, len(lines))) as pool:
        return list(pool.map(work, lines, arguments))
