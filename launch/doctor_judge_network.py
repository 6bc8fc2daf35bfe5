"""Judging what lies between the machines: names, connections, clocks, shared folder, all-reduce."""

import ipaddress
from collections.abc import Iterator
from statistics import median

from launch.doctor_facts import NetworkFacts, Node, NodeFacts
from launch.doctor_verdict import Case, Status, Verdict, usual

SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0  # munge, and with it SLURM, refuses five minutes
LEAST_OF_PAIRS = 0.5
LEAST_NCCL_GB_S = 5.0  # between two nodes; below, it has fallen back to TCP
INTERFACE = "set GLOO_SOCKET_IFNAME to the interface between the nodes (`ip -brief address`)"


def judge_own_names(case: Case) -> Iterator[Verdict]:
    for name, facts in case.looked_at:
        address = facts.own_address or "no address"
        found = f"{facts.own_name} is {address}"
        if facts.interface:
            yield Verdict("own name", name, "ok", f"{found}; GLOO_SOCKET_IFNAME={facts.interface}")
        elif case.many and _is_own(facts):
            yield Verdict("own name", name, "fail", f"{found}, where no other node can reach it", f"write its address into "
                          f"/etc/hosts there, or {INTERFACE}; gloo would hang without a word")  # fmt: skip
        else:
            yield Verdict("own name", name, "ok", found)


def judge_names(case: Case) -> Iterator[Verdict]:
    if not case.many:
        return
    addresses: dict[str, list[str]] = {}
    for _, facts in case.looked_at:
        for host, address in facts.resolved:
            if address and not ipaddress.ip_address(address).is_loopback:
                addresses.setdefault(host, []).append(address)
    for name, facts in case.looked_at:
        wrong = []
        for host, address in facts.resolved:
            same = usual(addresses.get(host, [address]))
            if not address:
                wrong.append(f"{host} is unknown")
            # A node may know itself by 127.0.1.1, which the check of own names judges.
            elif address != same and host not in (facts.own_name, name):
                wrong.append(f"{host} is {address}, elsewhere {same}")
        if wrong:
            yield Verdict("names", name, "fail", "; ".join(wrong), "the same /etc/hosts or DNS on all nodes")
        elif facts.resolved:
            yield Verdict("names", name, "ok", f"all {len(facts.resolved)} known")


def judge_environment(case: Case) -> Iterator[Verdict]:
    check = "environment"
    behind = [f"{variable} is set here and does not travel" for variable in case.left_behind]
    for name, facts in case.looked_at:
        there = dict(facts.environment)
        lost = [
            f"{variable} is {there[variable]!r} and not {value!r}"
            if variable in there
            else f"{variable} did not arrive"
            for variable, value in case.environment.items()
            if there.get(variable) != value
        ]
        own = [
            f"{variable}={value} is set there alone"
            for variable, value in there.items()
            if variable not in case.environment
        ]
        if lost:
            remedy = "start through launch/stage1.sh or srun --export=ALL; see what the node's profile sets"
            yield Verdict(check, name, "fail", "; ".join(lost), remedy)
        elif own or behind:
            remedy = "set it here as well, or nowhere; what travels is listed in launch/environment.py"
            yield Verdict(check, name, "warn", "; ".join(own + behind), remedy)
        else:
            count = len(case.environment)
            yield Verdict(
                check, name, "ok", f"{count} variable{'s' * (count != 1)} arrived" if count else "none is set"
            )


def judge_ports(case: Case) -> Iterator[Verdict]:
    other = "give another --port here and as MASTER_PORT to the launcher"
    for node in case.nodes:
        if node.facts is not None and node.facts.port_error:
            status: Status = "fail" if case.port_chosen else "warn"
            yield Verdict(
                "port",
                node.name,
                status,
                node.facts.port_error,
                f"`ss -ltnp` there shows who has it: end that, or {other}",
            )
        elif node.network is not None and node.rank is None and node.network.trouble:
            yield Verdict(
                "port", node.name, "fail", node.network.trouble, f"open that port between the nodes, or {other}"
            )
        elif node.facts is not None:
            yield Verdict("port", node.name, "ok", "ranks can meet")


def judge_shared(case: Case) -> Iterator[Verdict]:
    for node, network in _seen(case):
        if network.shared_error:
            yield Verdict("shared folder", node.name, "fail", network.shared_error, "run.output (without a CONFIG: the current "
                          "folder) has to be the same file system on all nodes")  # fmt: skip
        elif network.rename_error:
            yield Verdict("shared folder", node.name, "fail", f"renaming: {network.rename_error}", "checkpoints need a file system "
                          "with atomic renames (NFS, Lustre, CephFS), writable for this user")  # fmt: skip
        elif not network.trouble or network.reached:
            yield Verdict(
                "shared folder", node.name, "ok", "seen by all, renames work" if case.many else "renames work"
            )


def judge_connections(case: Case) -> Iterator[Verdict]:
    trips = [r.round_trip_s for _, network in _seen(case) for r in network.reached if not r.error]
    for node, network in _seen(case):
        wrong = [f"{case.names.get(r.peer, r.peer)}: {r.error}" for r in network.reached if r.error]
        if wrong:
            yield Verdict("connections", node.name, "fail", f"to {'; to '.join(wrong)}", f"open all ports between the nodes, and "
                          f"{INTERFACE}")  # fmt: skip
        elif network.reached:
            yield Verdict("connections", node.name, "ok", f"all nodes within {max(trips) * 1e3:.2g} ms")


def judge_clocks_between(case: Case) -> Iterator[Verdict]:
    first = min(case.names, default=None)
    for node, network in _seen(case):
        if node.rank == first and case.many:
            yield Verdict("time", node.name, "ok", "")
        for r in network.reached:
            if r.peer != first or r.error:
                continue
            skew = -r.offset_s  # of this node, ahead of the first
            told = f"{abs(skew):.3g} s {'ahead of' if skew > 0 else 'behind'} {case.names[r.peer]}"
            if abs(skew) - r.round_trip_s / 2 > SKEW_WARN_S:
                status: Status = "fail" if abs(skew) > SKEW_FAIL_S else "warn"
                yield Verdict("time", node.name, status, told, "`timedatectl set-ntp true`, or chrony, there")
            else:
                yield Verdict("time", node.name, "ok", f"within {max(0.001, abs(skew) + r.round_trip_s / 2):.2g} s")


def judge_pairs(case: Case) -> Iterator[Verdict]:
    speeds = [r.gb_per_s for _, network in _seen(case) for r in network.reduced if r.peer is not None and not r.error]
    usual_speed = median(speeds) if speeds else 0.0
    check = "all-reduce of two"
    for node, network in _seen(case):
        tried = {r.peer for r in network.reduced}
        left = [r.peer for r in network.reached if not r.error and r.peer not in tried]
        if left and not network.trouble:
            others = len(network.reached)
            yield Verdict(check, node.name, "skip", f"{others - len(left)} of {others} pairs in the time there is")
        for r in network.reduced:
            if r.peer is None:
                continue
            peer = case.names.get(r.peer, f"rank {r.peer}")
            told = f"with {peer} {r.gb_per_s:.3g} GB/s"
            if r.error:
                yield Verdict(check, node.name, "fail", f"with {peer}: {r.error}", f"NCCL_DEBUG=INFO says why; {INTERFACE}"
                              ", and NCCL_SOCKET_IFNAME likewise")  # fmt: skip
            elif network.backend == "nccl" and r.gb_per_s < LEAST_NCCL_GB_S:
                yield Verdict(check, node.name, "warn", told, "NCCL seems to use TCP: NCCL_DEBUG=INFO names its network; "
                              "see NCCL_IB_HCA and `ibstat`")  # fmt: skip
            elif r.gb_per_s < LEAST_OF_PAIRS * usual_speed:
                yield Verdict(check, node.name, "warn", f"{told}, usual are {usual_speed:.3g}", "cable, port or switch "
                              "of one of the two: compare with its other pairs")  # fmt: skip
            else:
                yield Verdict(
                    "all-reduce of two", node.name, "ok", f"about {usual_speed:.2g} GB/s over {network.backend}"
                )


def judge_whole(case: Case) -> Iterator[Verdict]:
    wholes = [r.gb_per_s for _, network in _seen(case) for r in network.reduced if r.peer is None and not r.error]
    for node, network in _seen(case):
        whole = next((r for r in network.reduced if r.peer is None), None)
        if network.trouble and node.rank is not None:
            yield Verdict("all-reduce of all", node.name, "fail", network.trouble, "first repair what else is wrong")
        elif whole is not None and whole.error:
            yield Verdict("all-reduce of all", node.name, "fail", whole.error, "NCCL_DEBUG=INFO on all ranks says why")
        elif whole is not None:
            told = f"{min(wholes):.2g} GB/s over {network.backend}"
            yield Verdict("all-reduce of all", node.name, "ok", told)


def _seen(case: Case) -> list[tuple[Node, NetworkFacts]]:
    return [(node, node.network) for node in case.nodes if node.network is not None]


def _is_own(facts: NodeFacts) -> bool:
    return not facts.own_address or ipaddress.ip_address(facts.own_address).is_loopback
