"""`fw doctor` under torchrun, deepspeed, srun or mpirun: the ranks meet where training would, and rank 0 hears them all."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as c10d

from fw_train.dist import Launch
from launch.doctor_agent import STORE_S
from launch.doctor_facts import Asked, Gemm, NetworkFacts, Node, NodeFacts, from_json, to_json
from launch.doctor_gpu import run_gemms
from launch.doctor_network import Meeting, Missing, look_at_network
from launch.doctor_node import GEMM_TIMEOUT_S, devices_here, look_at_node

START_S = 60.0  # that ranks may need for looking at their nodes
NETWORK_S = 40.0


class NobodyThere(RuntimeError):
    """Rank 0 cannot be reached."""


def meet(launch: Launch) -> c10d.Store:
    """The store of this job: torchrun's own where it has one, else rank 0 opens it."""
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    assert launch.address is not None
    timeout = timedelta(seconds=STORE_S)
    deadline = time.monotonic() + START_S
    while True:
        try:
            opens = launch.rank == 0 and not agents
            store = c10d.TCPStore(launch.address, launch.port, None, opens, timeout, wait_for_workers=False)
            break
        except RuntimeError as error:
            if time.monotonic() > deadline or launch.rank == 0:
                told = str(error).splitlines()[0][:300]
                raise NobodyThere(
                    f"{launch.address}:{launch.port}, where ranks meet, cannot be used: {told}"
                ) from error
    return c10d.PrefixStore(f"fw doctor {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def ask_ranks(launch: Launch, asked: Asked) -> list[Node] | None:
    """The facts of all nodes on rank 0, None elsewhere."""
    store = meet(launch)
    everybody = Meeting(store, launch.rank, range(launch.size), [])
    own = launch.local_rank if launch.local_size != 1 else None
    if launch.local_rank == 0:
        everybody.put("look", {"facts": to_json(look_at_node(asked, own))})
    else:  # the node has been looked at; this rank's GPU has not
        gemms = run_gemms(devices_here(own, {})[0], GEMM_TIMEOUT_S)
        everybody.put("look", {"gemms": [asdict(gemm) for gemm in gemms]})
    looks = _who_came(everybody) if launch.rank == 0 else {}
    if launch.rank == 0:
        everybody.put("members", [list(looks), [rank for rank, look in looks.items() if "facts" in look]])
    try:
        ranks, leaders = everybody.get("members", 0, 2 * START_S)
    except Missing as missing:
        raise NobodyThere(f"{missing}; rank 0 says why") from missing
    if launch.rank not in ranks:
        raise NobodyThere(f"rank {launch.rank} came more than {START_S:.0f} s after rank 0, which went on without it")
    found = look_at_network(Meeting(store, launch.rank, ranks, leaders), asked.folder, _device(own))
    everybody.put("network", to_json(found))
    return _nodes(everybody, looks) if launch.rank == 0 else None


def _who_came(everybody: Meeting) -> dict[int, Any]:
    """What the ranks found on their nodes, of those that came in time."""
    deadline, looks = time.monotonic() + START_S, {}
    for rank in everybody.ranks:
        with suppress(Missing):  # those that came stay, however late the others are
            looks[rank] = everybody.get("look", rank, deadline - time.monotonic())
    return looks


def _nodes(everybody: Meeting, looks: Mapping[int, Any]) -> list[Node]:
    """One for each rank that leads a node, with the GPUs of those behind it; and one for each that did not come."""
    deadline, nodes = time.monotonic() + NETWORK_S, []
    for rank in everybody.ranks:
        look = looks.get(rank)
        if look is None:
            nodes.append(Node(f"rank {rank}", trouble=f"did not come within {START_S:.0f} s"))
        elif "facts" in look:
            facts = from_json(NodeFacts, look["facts"])
            try:
                network = from_json(NetworkFacts, everybody.get("network", rank, deadline - time.monotonic()))
            except Missing as missing:
                network = NetworkFacts(rank, "", trouble=str(missing))
            nodes.append(Node(facts.own_name, facts, network, rank))
        else:
            nodes = _with_gemms(nodes, tuple(Gemm(**gemm) for gemm in look["gemms"]))
    return nodes


def _with_gemms(nodes: Sequence[Node], gemms: tuple[Gemm, ...]) -> list[Node]:
    """Those of a further rank go to the last node that has been looked at: ranks are counted node by node."""
    at = max((at for at, node in enumerate(nodes) if node.facts is not None), default=None)
    if at is None:
        return list(nodes)
    facts = nodes[at].facts
    assert facts is not None
    return [*nodes[:at], replace(nodes[at], facts=replace(facts, gemms=facts.gemms + gemms)), *nodes[at + 1 :]]


def _device(local_rank: int | None) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0 if local_rank is None or torch.cuda.device_count() == 1 else local_rank)
