"""All verdicts in their order, as a table of checks and nodes, and below it what to do about each that is not well."""

import textwrap
from collections.abc import Callable, Iterator, Sequence

from launch import doctor_judge_network as network
from launch import doctor_judge_node as node
from launch.doctor_verdict import ORDER, Case, Status, Verdict

CHECKS: tuple[Callable[[Case], Iterator[Verdict]], ...] = (
    node.judge_answers, node.judge_code, node.judge_packages,
    node.judge_gpus, node.judge_gpu_memory, node.judge_drivers, node.judge_gemms, node.judge_clocks, node.judge_ecc,
    node.judge_memory, node.judge_shm, node.judge_disk, node.judge_limits, node.judge_infiniband,
    network.judge_own_names, network.judge_names, network.judge_environment, node.judge_reads, network.judge_ports,
    network.judge_shared, network.judge_connections, network.judge_clocks_between, network.judge_pairs, network.judge_whole,
)  # fmt: skip
MARKS: dict[Status, str] = {"ok": "ok", "skip": "skip", "warn": "WARN", "fail": "FAIL"}
NAMED_COLUMNS = 6  # above so many nodes, columns are numbered
FOUND_WIDTH, WIDTH = 70, 120


def judge(case: Case) -> list[Verdict]:
    """Every check on every node that it applies to."""
    if not case.looked_at:
        return list(node.judge_answers(case))
    return [verdict for check in CHECKS for verdict in check(case)]


def failed(verdicts: Sequence[Verdict]) -> bool:
    return any(verdict.status == "fail" for verdict in verdicts)


def table(verdicts: Sequence[Verdict], nodes: Sequence[str]) -> str:
    """A line for each check, a column for each node; a cell shows the worst, a dash what was not looked at."""
    heads = list(nodes) if len(nodes) <= NAMED_COLUMNS else [str(number + 1) for number in range(len(nodes))]
    lines = [] if heads == list(nodes) else [f"{head:>3}  {name}" for head, name in zip(heads, nodes, strict=True)]
    widths = [max(4, len(head)) for head in heads]
    checks = list(dict.fromkeys(verdict.check for verdict in verdicts))
    first = max(len(check) for check in checks)
    columns = "  ".join(f"{head:{width}}" for head, width in zip(heads, widths, strict=True))
    lines.append(f"{'':{first}}  {columns}  found")
    for check in checks:
        here = [verdict for verdict in verdicts if verdict.check == check]
        cells = "  ".join(f"{_cell(here, name):{width}}" for name, width in zip(nodes, widths, strict=True))
        lines.append(f"{check:{first}}  {cells}  {_found(here)}".rstrip())
    return "\n".join(lines)


def remedies(verdicts: Sequence[Verdict]) -> str:
    """What is wrong, where, and what to do: the same on several nodes is said once."""
    lines = []
    wrong: dict[tuple[str, ...], list[str]] = {}
    for verdict in sorted(verdicts, key=lambda v: -ORDER.index(v.status)):
        if verdict.status in ("fail", "warn"):
            key = (MARKS[verdict.status], verdict.check, verdict.found, verdict.remedy)
            wrong.setdefault(key, []).append(verdict.node)
    for (mark, check, found, remedy), names in wrong.items():
        lines += textwrap.wrap(
            f"{mark}  {check} on {', '.join(names)}: {found}", WIDTH, subsequent_indent="      ", break_on_hyphens=False
        )
        lines += textwrap.wrap(
            remedy, WIDTH, initial_indent="      -> ", subsequent_indent="         ", break_on_hyphens=False
        )
    return "\n".join(lines)


def _cell(verdicts: Sequence[Verdict], node_name: str) -> str:
    own = [verdict.status for verdict in verdicts if verdict.node == node_name]
    return MARKS[max(own, key=ORDER.index)] if own else "-"


def _found(verdicts: Sequence[Verdict]) -> str:
    """What was found where all is well: one text if it is the same everywhere."""
    texts = list(dict.fromkeys(v.found for v in verdicts if v.status in ("ok", "skip") and v.found))
    joined = "; ".join(texts)
    return joined if len(joined) <= FOUND_WIDTH else joined[: FOUND_WIDTH - 3] + "..."
