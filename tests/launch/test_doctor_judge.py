"""Findings are judged: what is named, on which node, how badly, and what to do about it."""

import re
from dataclasses import replace

import pytest
from doctor_findings import GIB, SMALL_CARD, TWO_H20, changed, cpu_facts, gpu_facts, healthy, ill, network_facts

from launch.doctor_facts import Gemm, NetworkFacts, Node, NodeFacts, Reached, Read, Reduced, Space, from_json, to_json
from launch.doctor_gpu import parse_gpus
from launch.doctor_needs import Needs
from launch.doctor_table import CHECKS, failed, judge, remedies, table
from launch.doctor_verdict import Case, Verdict

NEEDS = Needs(save_bytes=16 * GIB, kept=3, state_bytes=14 * GIB, loader_bytes=2 * GIB)
GPUS = gpu_facts().gpus


@pytest.mark.parametrize("nodes", [healthy(), healthy(gpu_facts, "nccl")], ids=["without GPUs", "with GPUs"])
def test_nothing_is_said_of_machines_that_are_well(nodes):
    assert ill(nodes, needs=NEEDS) == {}
    assert ill(nodes[:1], needs=NEEDS) == {}
    verdicts = judge(Case(nodes, NEEDS, {"OMP_NUM_THREADS": "8"}))
    assert {v.node for v in verdicts} == {"node1", "node2", "node3"}
    assert not failed(verdicts)
    assert remedies(verdicts) == ""


CASES = {
    "other code": ({"tree": "ffff"}, "code", "fail", "most nodes have 0123456789ab", "same commit"),
    "other package": (
        {"packages": (("python", "3.11.7"), ("torch", "2.13.0"), ("deepspeed", "0.19.8"), ("einops", "0.6.0"))},
        "packages", "fail", "einops 0.6.0, elsewhere 0.8.2", "pip install -r requirements.txt",
    ),
    "broken package": ({"broken": (("av", "ImportError: libx"),)}, "packages", "fail", "av cannot be imported", "pip"),
    "a GPU is gone": ({"gpus": GPUS[:1]}, "GPUs", "fail", "1 x NVIDIA H20; most nodes have 2 x NVIDIA H20", "xid"),
    "no GPU": ({"gpus": (), "gpu_note": "no nvidia-smi here"}, "GPUs", "fail", "no nvidia-smi here", "--gpus all"),
    "left over": (
        {"gpus": (replace(GPUS[0], used_mib=70_000.0), GPUS[1])},
        "GPU memory", "warn", "GPU 0: 68.4 GiB", "an earlier run",
    ),
    "other driver": (
        {"gpus": tuple(replace(gpu, driver="535.1") for gpu in GPUS)}, "driver", "warn", "535.1", "most nodes have 550.127.08",
    ),
    "crash": (
        {"gemms": (Gemm("cuda:0", "", None, "killed by signal 8: "),)},
        "bf16 products", "fail", r"cuda:0: killed by signal 8: .*cuBLAS 12.4.5.8", "another version of cuBLAS",
    ),
    "old cuBLAS": ({"cublas": "12.4.2.65"}, "bf16 products", "fail", "cuBLAS 12.4.2.65 on H20", "nvidia-cublas-cu12==12.4.5.8"),
    "half speed": (
        {"gemms": (Gemm("cuda:1", "NVIDIA H20", 60.0),)}, "bf16 products", "warn", "cuda:1: 60 TFLOP/s.*peak is 148", "nvidia-smi",
    ),
    "slower than the others": (
        {"gemms": (Gemm("cuda:1", "NVIDIA H20", 100.0),)}, "bf16 products", "warn", "others reach 135", "slows all",
    ),
    "hot": (
        {"gpus": (GPUS[0], replace(GPUS[1], slowed=0x44, temperature_c=91.0))},
        "clocks", "warn", "GPU 1: hardware thermal at 91 C", "cooling",
    ),
    "capped": ({"gpus": (GPUS[0], replace(GPUS[1], max_clock_mhz=1200.0))}, "clocks", "warn", "1200 MHz, others 1980", "slows"),
    "memory errors": ({"gpus": (replace(GPUS[0], uncorrected=2), GPUS[1])}, "ECC", "fail", "GPU 0: 2", "ROW_REMAPPER"),
    "no ECC": ({"gpus": (replace(GPUS[0], ecc="Disabled"), GPUS[1])}, "ECC", "warn", "off on GPU 0", "nvidia-smi -e 1"),
    "small shm": ({"shm": Space("/dev/shm", 64 << 20, 64 << 20)}, "/dev/shm", "fail", "64 MiB free, 1 GiB needed", "--ipc=host"),
    "no shm": ({"shm": None}, "/dev/shm", "fail", "there is none", "tmpfs"),
    "full disk": ({"disk": Space("/shared", 900 * GIB, GIB)}, "disk", "fail", "one save needs 16 GiB", "/shared"),
    "nearly full disk": ({"disk": Space("/shared", 900 * GIB, 40 * GIB)}, "disk", "warn", "need 64 GiB", "keep_last"),
    "no folder": ({"disk": None}, "disk", "fail", "does not exist", "run.output"),
    "little memory": ({"memory_free": 8 * GIB}, "memory", "fail", "8 GiB free.* up to 8.67 GiB", "data.workers"),
    "few files": ({"open_files": 1024}, "open files", "warn", "at most 1024", "ulimit -n"),
    "no pinning": ({"memlock": 65536}, "locked memory", "fail", "at most 64 KiB", "memlock=-1"),
    "port down": ({"infiniband": (("mlx5_0:1", "1: DOWN"),)}, "InfiniBand", "warn", "mlx5_0:1 is 1: DOWN", "cable"),
    "no InfiniBand": ({"infiniband": ()}, "InfiniBand", "warn", "0 ports, most nodes have 1", "/dev/infiniband"),
    "loopback name": ({"own_address": "127.0.1.1"}, "own name", "fail", "is 127.0.1.1, where no other", "GLOO_SOCKET_IFNAME"),
    "nameless": ({"own_address": ""}, "own name", "fail", "is no address", "/etc/hosts"),
    "other address": (
        {"resolved": (("node1", "10.9.9.9"), ("node2", "10.0.0.2"), ("node3", ""))},
        "names", "fail", "node1 is 10.9.9.9, elsewhere 10.0.0.1; node3 is unknown", "/etc/hosts",
    ),
    "lost variable": ({"environment": ()}, "environment", "fail", "OMP_NUM_THREADS did not arrive", "launch/stage1.sh"),
    "other value": ({"environment": (("OMP_NUM_THREADS", "1"),)}, "environment", "fail", "is '1' and not '8'", "profile"),
    "own variable": (
        {"environment": (("NCCL_ALGO", "Ring"), ("OMP_NUM_THREADS", "8"))},
        "environment", "warn", "NCCL_ALGO=Ring is set there alone", "nowhere",
    ),
    "taken port": ({"port_error": "29500: in use"}, "port", "warn", "29500: in use", "ss -ltnp"),
    "no data": ({"reads": (Read("data/train", "", "data/train: gone"),)}, "data, weights", "fail", "data/train: gone", "mount"),
    "other data": ({"reads": (Read("data/train", "9 samples"),)}, "data, weights", "fail", "9 samples; most", "one copy"),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "check", "status", "found", "remedy"), CASES.values(), ids=CASES)
def test_each_finding_is_named_with_its_remedy(facts, check, status, found, remedy):
    wrong = ill(changed(healthy(gpu_facts, "nccl"), 1, **facts), needs=NEEDS)
    assert list(wrong) == [(check, "node2")]
    verdict = wrong[check, "node2"]
    assert verdict[0] == status
    assert re.search(found, verdict[1]), verdict
    assert remedy in verdict[2]


def reached(**second):
    return tuple(replace(r, **second) if r.peer == 0 else r for r in network_facts(1).reached)


def reduced(**with_first):
    return tuple(replace(r, **with_first) if r.peer == 0 else r for r in network_facts(1).reduced)


BETWEEN = {
    "blocked": ({"reached": reached(error="refused")}, "connections", "fail", "to node1: refused", "open all ports"),
    "behind": ({"reached": reached(offset_s=3.0)}, "time", "warn", "3 s behind node1", "set-ntp"),
    "far ahead": ({"reached": reached(offset_s=-90.0)}, "time", "fail", "90 s ahead of node1", "chrony"),
    "pair fails": (
        {"reduced": reduced(error="Timed out")},
        "all-reduce of two",
        "fail",
        "with node1: Timed out",
        "NCCL_DEBUG",
    ),
    "pair is slow": (
        {"reduced": reduced(gb_per_s=15.0)},
        "all-reduce of two",
        "warn",
        "node1 15 GB/s, usual are 40",
        "cable",
    ),
    "pair over TCP": ({"reduced": reduced(gb_per_s=1.2)}, "all-reduce of two", "warn", "1.2 GB/s", "NCCL_IB_HCA"),
    "whole fails": (
        {"reduced": (Reduced(None, 0, "9 sums are wrong"),)},
        "all-reduce of all",
        "fail",
        "9 sums",
        "NCCL_DEBUG",
    ),
    "left": ({"reduced": (), "trouble": "rank 2 did not come"}, "all-reduce of all", "fail", "rank 2 did", "repair"),
    "not shared": (
        {"shared_error": "nonce: No such file"},
        "shared folder",
        "fail",
        "No such file",
        "same file system",
    ),
    "no rename": (
        {"rename_error": "not permitted"},
        "shared folder",
        "fail",
        "renaming: not permitted",
        "atomic renames",
    ),
}


@pytest.mark.parametrize(("network", "check", "status", "found", "remedy"), BETWEEN.values(), ids=BETWEEN)
def test_what_lies_between_nodes_is_named_too(network, check, status, found, remedy):
    wrong = ill(changed(healthy(gpu_facts, "nccl"), 1, network=network))
    assert list(wrong) == [(check, "node2")]
    assert wrong[check, "node2"][0] == status
    assert found in wrong[check, "node2"][1]
    assert remedy in wrong[check, "node2"][2]


def test_pairs_for_which_time_was_short_are_told():
    few = tuple(r for r in network_facts(1).reduced if r.peer != 2)
    verdicts = judge(Case(changed(healthy(), 1, network={"reduced": few}), environment={"OMP_NUM_THREADS": "8"}))
    (left,) = [v for v in verdicts if v.check == "all-reduce of two" and v.status == "skip"]
    assert (left.node, left.found) == ("node2", "1 of 2 pairs in the time there is")
    assert not failed(verdicts)


def test_a_skew_within_the_round_trip_is_none():
    slow = (replace(network_facts(1).reached[0], offset_s=4.0, round_trip_s=7.0),)
    assert ill(changed(healthy(), 1, network={"reached": slow})) == {}


def test_a_node_without_an_answer_is_named_and_the_others_are_judged():
    said = "ssh failed: ssh: connect to host node2 port 22: Connection refused"
    wrong = ill([healthy()[0], Node("node2", trouble=said), changed(healthy(), 2, tree="ffff")[2]])
    assert set(wrong) == {("answers", "node2"), ("code", "node3")}
    assert wrong["answers", "node2"] == ("fail", said, "no sshd listens on that port: start it, or give --ssh-port")
    alone = ill(
        [Node("node1", trouble="no answer within 55 s: x"), Node("node2", trouble="its agent ended with code 3")]
    )
    assert "ping node1" in alone["answers", "node1"][2]
    assert "ssh node2 true" in alone["answers", "node2"][2]


@pytest.mark.parametrize(
    ("trouble", "remedy"),
    [
        ("no answer within 45 s: reading /data/train", "whether that file system answers"),
        ("no answer within 45 s: multiplying", "dmesg"),
        ("no answer within 60 s: importing packages", "a second try"),
        ("its agent ended with code 1: bash: line 1: cd: /work: No such file or directory", "under the same path"),
        ("its agent ended with code 1: python: No module named launch", "under the same path"),
        ("ssh failed: node2: Permission denied (publickey).", "ssh-copy-id node2"),
        ("ssh failed: Host key verification failed.", "known_hosts"),
        ("no answer within 45 s", "ping node2"),
        ("did not come within 50 s", "on its node alone"),
    ],
)
def test_why_a_node_gave_no_answer_decides_the_remedy(trouble, remedy):
    assert remedy in ill([healthy()[0], Node("node2", trouble=trouble)])["answers", "node2"][2]


def test_a_node_that_cannot_reach_the_meeting_point_is_a_matter_of_its_port():
    nodes = healthy()
    nodes[2] = replace(nodes[2], rank=None, network=NetworkFacts(-1, "", trouble="cannot reach node1:29500"))
    assert ill(nodes)["port", "node3"][0] == "fail"
    assert ill(changed(healthy(), 0, port_error="29500 taken"), port_chosen=True)["port", "node1"][0] == "fail"


def test_slots_and_variables_that_stay_here_are_compared():
    nodes = healthy(gpu_facts, "nccl")
    wrong = ill(nodes, slots={"node1": 2, "node2": 8, "node3": 2})
    assert wrong["GPUs", "node2"][1:] == ("2 x NVIDIA H20, and slots=8", "slots=2 in the hostfile")
    wrong = ill(nodes, left_behind=["NCCL_X"])
    assert wrong["environment", "node1"][0] == "warn"


def test_alone_a_loopback_name_is_well():
    assert ill(changed(healthy()[:1], 0, own_address="127.0.1.1", resolved=())) == {}


def test_nvidia_smi_is_read():
    first, second = parse_gpus(TWO_H20)
    assert first == (type(first))(0, "NVIDIA H20", "550.127.08", 97871.0, 14.0, 345.0, 1980.0, 1, "Enabled", 0, 31.0)
    assert (second.index, second.slowed, second.temperature_c) == (1, 4, 62.0)
    (card,) = parse_gpus(SMALL_CARD)
    assert (card.name, card.ecc, card.uncorrected) == ("NVIDIA GeForce RTX 3090", None, None)
    with pytest.raises(ValueError, match="11 values were asked for"):
        parse_gpus("0, NVIDIA H20\n")


def test_facts_survive_json():
    for facts in (cpu_facts(), gpu_facts()):
        assert from_json(NodeFacts, to_json(facts)) == facts
    facts = replace(network_facts(0), trouble="x", reached=(Reached(1, "no", -1.5, 2.0),))
    assert from_json(NetworkFacts, to_json(facts)) == facts


def test_the_table_has_a_cell_for_each_node_and_the_worst_of_it():
    verdicts = [
        Verdict("code", "a", "ok", "v1"), Verdict("code", "longer", "ok", "v1"), Verdict("disk", "a", "warn", "full"),
        Verdict("disk", "a", "ok", "9 GiB"), Verdict("disk", "longer", "skip", "none"), Verdict("ECC", "longer", "fail", "2"),
    ]  # fmt: skip
    assert table(verdicts, ["a", "longer"]).splitlines() == [
        "      a     longer  found",
        "code  ok    ok      v1",
        "disk  WARN  skip    9 GiB; none",
        "ECC   -     FAIL",
    ]
    names = [f"rack1-node{number:02}" for number in range(14)]
    lines = table([Verdict("code", name, "ok", "v1") for name in names], names).splitlines()
    assert lines[13] == " 14  rack1-node13"
    assert max(map(len, lines)) < 120


def test_the_same_on_several_nodes_is_said_once_and_failures_first():
    verdicts = [
        Verdict("disk", "a", "warn", "full", "make room"), Verdict("disk", "b", "warn", "full", "make room"),
        Verdict("code", "b", "fail", "old", "pull"),
    ]  # fmt: skip
    assert remedies(verdicts).splitlines() == [
        "FAIL  code on b: old", "      -> pull", "WARN  disk on a, b: full", "      -> make room",
    ]  # fmt: skip


def test_every_check_of_the_map_is_judged():
    verdicts = judge(Case(healthy(gpu_facts, "nccl"), NEEDS, {"OMP_NUM_THREADS": "8"}))
    assert (
        len({verdict.check for verdict in verdicts}) == len(CHECKS) + 1
    )  # open files and locked memory are one function
