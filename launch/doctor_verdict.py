"""What a check says of a node."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from launch.doctor_facts import Node, NodeFacts

if TYPE_CHECKING:
    from launch.doctor_needs import Needs  # builds the network, for which a package may be missing

Status = Literal["ok", "skip", "warn", "fail"]
ORDER: tuple[Status, ...] = ("ok", "skip", "warn", "fail")  # ascending: the worst of a cell is shown


UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Verdict(NamedTuple):
    check: str
    node: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Case:
    """All that is judged together."""

    nodes: Sequence[Node] = ()
    needs: "Needs | None" = None  # without a configuration nothing particular is needed
    environment: Mapping[str, str] = field(default_factory=dict)  # that must have arrived
    left_behind: Sequence[str] = ()  # set here, and not on the list of what travels
    slots: Mapping[str, int] = field(default_factory=dict)  # ranks that a node is to run
    port_chosen: bool = False  # launch/stage1.sh looks for a port of its own unless it is given one

    @property
    def looked_at(self) -> list[tuple[str, NodeFacts]]:
        return [(node.name, node.facts) for node in self.nodes if node.facts is not None]

    @property
    def many(self) -> bool:
        return len(self.nodes) > 1

    @property
    def names(self) -> dict[int, str]:
        """Nodes by the rank that speaks for them."""
        return {node.rank: node.name for node in self.nodes if node.rank is not None}


def usual(values: Iterable[Hashable]) -> Hashable:
    """The most frequent, the first of those that are equally frequent."""
    return Counter(values).most_common(1)[0][0]


def bytes_text(count: float) -> str:
    """As 1.5 GiB."""
    unit = next((number for number, name in enumerate(UNITS) if abs(count) < 1024 ** (number + 1)), len(UNITS) - 1)
    value = count / 1024**unit
    return f"{value:.3g} {UNITS[unit]}" if value < 100 else f"{value:.0f} {UNITS[unit]}"
