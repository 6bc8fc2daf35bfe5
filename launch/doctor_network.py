"""What a rank finds out about the others: who can be connected to, whose clock is off, what an all-reduce gives and costs.

Ranks meet in a store and nowhere else until every connection has been tried: a process group of all would hang on the first
two that cannot reach each other, and would not say which. Every wait has a limit, and whoever misses it is named.
"""

import json
import os
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from fcntl import ioctl
from typing import Any

import torch
import torch.distributed as c10d
from torch import Tensor

from launch.doctor_facts import NetworkFacts, Reached, Reduced
from launch.doctor_node import resolve
from launch.doctor_shared import try_folder

CONNECT_S = 4.0
PINGS = 5  # of which the quickest tells the clock best
GATHER_S = 20.0  # that the slowest may come later than the first
PAIRS_S = 20.0  # after which no further round of pairs begins
SIOCGIFADDR = 0x8915


class Missing(RuntimeError):
    """Somebody did not come."""


class Meeting:
    """The ranks that take part; `leaders` are one of each node."""

    def __init__(self, store: c10d.Store, rank: int, ranks: Sequence[int], leaders: Sequence[int]) -> None:
        self.store, self.rank, self.ranks, self.leaders = store, rank, list(ranks), list(leaders)

    def put(self, name: str, value: Any) -> None:
        self.store.set(f"{name}-{self.rank}", json.dumps(value))

    def get(self, name: str, rank: int, timeout_s: float) -> Any:
        """What that rank has put."""
        key = f"{name}-{rank}"
        try:
            self.store.wait([key], timedelta(seconds=max(timeout_s, 0.1)))
        except RuntimeError as error:  # DistStoreError, and DistNetworkError when the store has gone
            raise Missing(f"rank {rank} did not come to `{name}` within {timeout_s:.0f} s") from error
        return json.loads(self.store.get(key))

    def exchange(self, name: str, value: Any, ranks: Sequence[int]) -> dict[int, Any]:
        """What each of these ranks says. The first alone says who is missing: others would blame those who wait themselves."""
        self.put(f"{name} of", value)
        if self.rank == ranks[0]:
            deadline = time.monotonic() + GATHER_S
            try:
                said = [self.get(f"{name} of", rank, deadline - time.monotonic()) for rank in ranks]
                self.put(name, {"said": said})
            except Missing:
                there = [rank for rank in ranks if self.store.check([f"{name} of-{rank}"])]
                self.put(name, {"missing": [rank for rank in ranks if rank not in there]})
        # Ranks that lead no node come here long before the others.
        answer = self.get(name, ranks[0], 2 * GATHER_S + PAIRS_S)
        if "missing" in answer:
            missing = ", ".join(map(str, answer["missing"]))
            raise Missing(f"rank {missing} did not come to `{name}` within {GATHER_S:.0f} s")
        return dict(zip(ranks, answer["said"], strict=True))

    def agree(self, name: str, mine: bool, ranks: Sequence[int], until: float = float("inf")) -> bool:
        """Whether all of these ranks said yes, and the first's clock was before `until`: the same answer for all."""
        on_time = self.rank != ranks[0] or time.monotonic() < until
        return all(self.exchange(name, mine and on_time, ranks).values())


def look_at_network(meeting: Meeting, folder: str, device: torch.device) -> NetworkFacts:
    """All that this rank can say; ranks that are no leaders take part in the last all-reduce alone."""
    rank, leads = meeting.rank, meeting.rank in meeting.leaders
    backend = "nccl" if device.type == "cuda" else "gloo"
    reached: tuple[Reached, ...] = ()
    reduced: list[Reduced] = []
    shared_error = rename_error = trouble = ""
    try:
        if leads:
            shared_error, rename_error = try_folder(meeting, folder)
            reached = _connect_to_all(meeting)
            blocked = _blocked_pairs(meeting, reached)
            for pair in _reduce_pairs(meeting, blocked, device):
                reduced.append(pair)  # one by one: what has been found stays when somebody does not come
        fine = not any(r.error for r in reached) and not any(r.error for r in reduced)
        if not meeting.agree("whole", fine, meeting.ranks):
            trouble = "the all-reduce over all ranks was not tried, since not all pairs work"
        elif len(meeting.ranks) > 1:
            reduced.append(_reduce(meeting, "all", meeting.ranks, None, device))
    except Missing as missing:
        trouble = str(missing)
    return NetworkFacts(rank, backend, reached, tuple(reduced), shared_error, rename_error, trouble)


def rounds(players: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, each player at most once in a round: the circle method."""
    circle: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        circle[1:] = [circle[-1], *circle[1:-1]]


def gloo_address() -> str:
    """Where the others will look for this host: at its interface, or at what its own name stands for."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not name:
        return resolve(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        try:
            answer = ioctl(query.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


class _Answers(socketserver.StreamRequestHandler):
    """Answers each line with its rank and its time."""

    def handle(self) -> None:
        for _ in self.rfile:
            self.wfile.write(f"{self.server.rank} {time.time_ns()}\n".encode())  # type: ignore[attr-defined]
            self.wfile.flush()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, rank: int) -> None:
        super().__init__(("", 0), _Answers)
        self.rank = rank
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hangs up has told what it found itself."""


def _connect_to_all(meeting: Meeting) -> tuple[Reached, ...]:
    server = _Server(meeting.rank)
    addresses = meeting.exchange("address", [gloo_address(), server.server_address[1]], meeting.leaders)
    others = [rank for rank in meeting.leaders if rank != meeting.rank]
    with ThreadPoolExecutor(max(1, len(others))) as pool:
        found = tuple(pool.map(lambda rank: connect(rank, *addresses[rank]), others))
    meeting.agree("connected", True, meeting.leaders)  # nobody stops listening before
    server.shutdown()
    return found


def connect(peer: int, address: str, port: int) -> Reached:
    """Whether that rank answers at its address, and what its clock says."""
    if not address:
        return Reached(peer, "its own name, or GLOO_SOCKET_IFNAME, gives no address there")
    best: tuple[float, float] | None = None
    try:
        with socket.create_connection((address, port), CONNECT_S) as link:
            lines = link.makefile("rb")
            for _ in range(PINGS):
                sent = time.time_ns()
                link.sendall(b"\n")
                who, clock = map(int, lines.readline().split())
                received = time.time_ns()
                if who != peer:
                    return Reached(peer, f"rank {who} answers at its address {address}")
                trip = (received - sent) / 1e9
                offset = (clock - (sent + received) / 2) / 1e9
                best = (trip, offset) if best is None or trip < best[0] else best
    except (OSError, ValueError) as error:
        return Reached(peer, f"{address}:{port}: {error}")
    assert best is not None
    return Reached(peer, "", best[1], best[0])


def _blocked_pairs(meeting: Meeting, reached: Sequence[Reached]) -> set[tuple[int, int]]:
    """Pairs of which one cannot connect to the other."""
    blocked = meeting.exchange("blocked", [r.peer for r in reached if r.error], meeting.leaders)
    return {(min(rank, peer), max(rank, peer)) for rank, peers in blocked.items() for peer in peers}


def _reduce_pairs(meeting: Meeting, blocked: set[tuple[int, int]], device: torch.device) -> Iterator[Reduced]:
    until = time.monotonic() + PAIRS_S
    for number, pairs in enumerate(rounds(meeting.leaders)):
        # Together, so that nobody is blamed for a partner that an earlier round kept.
        if not meeting.agree(f"round {number}", True, meeting.leaders, until):
            return
        mine = next((pair for pair in pairs if meeting.rank in pair), None)
        if mine is None or mine in blocked:
            continue
        peer = mine[1] if mine[0] == meeting.rank else mine[0]
        yield _reduce(meeting, f"pair {mine[0]} {mine[1]}", mine, peer, device)


def _reduce(meeting: Meeting, name: str, ranks: Sequence[int], peer: int | None, device: torch.device) -> Reduced:
    index, size = ranks.index(meeting.rank), len(ranks)
    try:
        group = _group(c10d.PrefixStore(name, meeting.store), index, size, device)
        return Reduced(peer, *reduce_and_time(group, index, size, device))
    except RuntimeError as error:
        return Reduced(peer, 0.0, str(error).splitlines()[0][:300])


def reduce_and_time(group: Any, index: int, size: int, device: torch.device) -> tuple[float, str]:
    """GB/s as NCCL's tests count them, and what is wrong with the sum."""
    on_gpu = device.type == "cuda"
    elements, times = (1 << 27, 5) if on_gpu else (1 << 20, 3)
    pattern = torch.arange(elements, device=device).remainder_(61).float()
    tensor = pattern * (index + 1)
    _all_reduce(group, tensor)
    wrong = (tensor != pattern * (size * (size + 1) // 2)).nonzero()  # whole numbers: any order of summation is exact
    if len(wrong):
        at = int(wrong[0])
        error = f"{len(wrong)} of {elements} sums are wrong, the first at element {at}: {tensor[at].item():g}"
        return 0.0, error
    tensor.zero_()
    start = time.perf_counter()
    for _ in range(times):
        _all_reduce(group, tensor)
    seconds = (time.perf_counter() - start) / times
    return round(2 * (size - 1) / size * tensor.nbytes / seconds / 1e9, 3), ""


def _group(store: c10d.Store, index: int, size: int, device: torch.device) -> Any:
    """A process group that nothing else knows of: its failure ends nothing but itself."""
    if device.type == "cuda":
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # or a watchdog ends the process of whoever waits in vain
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=20)
        return c10d.ProcessGroupNCCL(store, index, size, options)
    return c10d.ProcessGroupGloo(store, index, size, timedelta(seconds=10))


def _all_reduce(group: Any, tensor: Tensor) -> None:
    group.allreduce([tensor]).wait()
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
