"""Findings of machines where all is well, to be changed by tests."""

from dataclasses import replace

from launch.doctor_facts import Gemm, NetworkFacts, Node, NodeFacts, Reached, Read, Reduced, Space
from launch.doctor_gpu import parse_gpus
from launch.doctor_table import judge
from launch.doctor_verdict import Case

GIB = 1 << 30
# nvidia-smi --query-gpu=index,name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks_throttle_reasons.active,
# ecc.mode.current,ecc.errors.uncorrected.volatile.total,temperature.gpu --format=csv,noheader,nounits
TWO_H20 = """\
0, NVIDIA H20, 550.127.08, 97871, 14, 345, 1980, 0x0000000000000001, Enabled, 0, 31
1, NVIDIA H20, 550.127.08, 97871, 14, 1980, 1980, 0x0000000000000004, Enabled, 0, 62
"""
SMALL_CARD = "0, NVIDIA GeForce RTX 3090, 535.183.01, 24576, 633, 210, 2100, 0x0000000000000001, [N/A], [N/A], 44\n"


def cpu_facts(number=1):
    return NodeFacts(
        own_name=f"node{number}",
        own_address=f"10.0.0.{number}",
        interface="",
        resolved=tuple((f"node{n}", f"10.0.0.{n}") for n in (1, 2, 3)),
        version="0.1.0 abc1234",
        tree="0123456789ab",
        packages=(("python", "3.11.7"), ("torch", "2.13.0"), ("deepspeed", "0.19.8"), ("einops", "0.8.2")),
        broken=(),
        gpus=(),
        gpu_note="torch sees no CUDA device",
        cublas="",
        gemms=(Gemm("cpu", "CPU", 0.1),),
        shm=Space("/dev/shm", 64 * GIB, 63 * GIB),
        disk=Space("/shared", 900 * GIB, 800 * GIB),
        memory_free=200 * GIB,
        open_files=65536,
        memlock=-1,
        infiniband=(),
        environment=(("OMP_NUM_THREADS", "8"),),
        port_error="",
        reads=(Read("data/train", "300 samples, manifest 00"),),
    )


def gpu_facts(number=1):
    gemms = tuple(Gemm(f"cuda:{index}", "NVIDIA H20", 135.0 + index) for index in (0, 1))
    ports = (("mlx5_0:1", "4: ACTIVE"),)
    return replace(
        cpu_facts(number), gpus=parse_gpus(TWO_H20), gpu_note="", gemms=gemms, cublas="12.4.5.8", infiniband=ports
    )


def network_facts(rank, ranks=3, backend="gloo"):
    peers = [peer for peer in range(ranks) if peer != rank]
    pairs = [Reduced(peer, 40.0) for peer in peers]
    return NetworkFacts(
        rank, backend, tuple(Reached(peer, "", 0.0001, 0.0002) for peer in peers), (*pairs, Reduced(None, 30.0))
    )


def healthy(facts=cpu_facts, backend="gloo"):
    """Three nodes."""
    return [Node(f"node{n}", facts(n), network_facts(n - 1, backend=backend), n - 1) for n in (1, 2, 3)]


def changed(nodes, index, network=None, **facts):
    """The nodes, one with other facts."""
    node = nodes[index]
    node = replace(node, facts=replace(node.facts, **facts))
    if network is not None:
        node = replace(node, network=replace(node.network, **network))
    return [*nodes[:index], node, *nodes[index + 1 :]]


def ill(nodes, **case):
    """{(check, node): (status, found, remedy)} of what is not well."""
    case = {"environment": {"OMP_NUM_THREADS": "8"}, **case}
    return {(v.check, v.node): v[2:] for v in judge(Case(nodes, **case)) if v.status in ("warn", "fail")}
