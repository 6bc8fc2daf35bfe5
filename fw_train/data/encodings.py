"""What encoded members were made with, by kind: the facts that all that a network is trained on must share.

Sources, held-out clips and the data of an earlier stage may differ in size and length. Encoder, weights and the rest of the
preprocessing may not: the same numbers would mean something else.
"""

from collections.abc import Mapping
from typing import Any

from fw_train.data.sidecar_files import Facts, difference, fingerprint

Encodings = Mapping[str, Facts]  # by kind of sidecar

OF_A_SOURCE = ("size", "frames")


def shared_facts(facts: Facts) -> dict[str, Any]:
    """The facts of a sidecar without those that may differ between sources."""
    return {name: fact for name, fact in facts.items() if name not in OF_A_SOURCE}


def conflicts(wanted: Encodings, found: Encodings) -> dict[str, str]:
    """How the kinds that both have differ: both fingerprints, and the facts."""
    return {
        kind: f"`{kind}` has the fingerprint {fingerprint(found[kind])[:16]} there, {fingerprint(facts)[:16]} here: "
        f"{difference(facts, found[kind])}"
        for kind, facts in wanted.items()
        if kind in found and found[kind] != facts
    }
