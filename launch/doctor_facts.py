"""What `fw doctor` found out, as plain records that travel as JSON; what they mean is judged elsewhere."""

import json
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Facts = TypeVar("Facts")


@dataclass(frozen=True)
class Asked:
    """What a node is to look at; the same for all."""

    folder: str = "."  # where runs write: on a file system that all nodes share
    datasets: tuple[str, ...] = ()
    files: tuple[str, ...] = ()  # weights
    hosts: tuple[str, ...] = ()  # names that every node must find
    variables: tuple[str, ...] = ()  # of the environment
    port: int | None = None  # where ranks will meet, on the first node; None: they have met already


@dataclass(frozen=True)
class Gpu:
    """A line of nvidia-smi; None for what the device or driver does not tell."""

    index: int
    name: str
    driver: str
    memory_mib: float | None
    used_mib: float | None  # before the doctor itself takes any
    clock_mhz: float | None
    max_clock_mhz: float | None
    slowed: int | None  # bits of clocks_throttle_reasons.active
    ecc: str | None  # Enabled or Disabled
    uncorrected: int | None  # memory errors since the driver was loaded
    temperature_c: float | None


@dataclass(frozen=True)
class Gemm:
    """bf16 products on one device, in a process of their own."""

    device: str
    name: str
    tflops: float | None
    error: str = ""  # crashed, wrong, or too late


@dataclass(frozen=True)
class Space:
    path: str
    total: int
    free: int


@dataclass(frozen=True)
class Read:
    """A file or dataset that a run reads."""

    path: str
    found: str  # what it is: must be the same everywhere
    error: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """One machine."""

    own_name: str
    own_address: str  # that its own name stands for; empty: none
    interface: str  # GLOO_SOCKET_IFNAME
    resolved: tuple[tuple[str, str], ...]  # host, address; empty: not found
    version: str
    tree: str  # a hash of all source files
    packages: tuple[tuple[str, str], ...]  # name, version
    broken: tuple[tuple[str, str], ...]  # name, why it cannot be imported
    gpus: tuple[Gpu, ...]
    gpu_note: str  # why there are no GPUs, or why nvidia-smi says nothing
    cublas: str
    gemms: tuple[Gemm, ...]
    shm: Space | None
    disk: Space | None
    memory_free: int
    open_files: int
    memlock: int  # bytes; -1: unlimited
    infiniband: tuple[tuple[str, str], ...]  # device and port, state
    environment: tuple[tuple[str, str], ...]
    port_error: str
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class Reached:
    """A plain connection to another node, and what its clock said."""

    peer: int
    error: str = ""
    offset_s: float = 0.0  # of the peer's clock, ahead of one's own
    round_trip_s: float = 0.0


@dataclass(frozen=True)
class Reduced:
    """An all-reduce, with one other node or with all."""

    peer: int | None  # None: all ranks
    gb_per_s: float = 0.0  # what each rank sends, as NCCL's tests count it
    error: str = ""


@dataclass(frozen=True)
class NetworkFacts:
    """What one rank saw of the others."""

    rank: int
    backend: str
    reached: tuple[Reached, ...] = ()
    reduced: tuple[Reduced, ...] = ()
    shared_error: str = ""  # the folder that all nodes share
    rename_error: str = ""
    trouble: str = ""  # why the rest was not tried


@dataclass(frozen=True)
class Node:
    """A node as the judge sees it."""

    name: str
    facts: NodeFacts | None = None
    network: NetworkFacts | None = None
    rank: int | None = None  # in the network's facts
    trouble: str = ""  # why there are no facts


def to_json(facts: Any) -> str:
    """One line."""
    return json.dumps(asdict(facts))


def from_json(kind: type[Facts], text: str) -> Facts:
    """The record, checked field by field."""
    from fw_train.config_reading import build  # here, since a node whose PyYAML is missing must still tell so

    return build(kind, json.loads(text), "facts of fw doctor")
