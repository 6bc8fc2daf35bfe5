"""A cluster that does not start says why at once, and nothing of it remains."""

from pathlib import Path

import pytest
import slurm_rig
from slurm_rig import build_cluster, missing_programs

pytestmark = [
    pytest.mark.multinode,
    pytest.mark.skipif(bool(missing_programs()), reason=f"the cluster needs {', '.join(missing_programs())}"),
]


def test_nothing_remains_of_a_cluster(tmp_path):
    with build_cluster(2, tmp_path / "rig") as cluster:
        assert cluster.run("srun", "--nodes=2", "hostname").split() in (["node1", "node2"], ["node2", "node1"])
        assert {"slurmctld", "slurmd", "munged", "sshd"} <= programs(tmp_path)
    assert programs(tmp_path) == set()


def test_nothing_remains_of_a_cluster_that_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr(
        slurm_rig, "CONFIGURATION", slurm_rig.CONFIGURATION.replace("main Nodes=ALL", "main Nodes=other")
    )
    with pytest.raises(RuntimeError, match="other"), build_cluster(2, tmp_path / "rig"):
        pass
    assert programs(tmp_path) == set()


def programs(folder):
    """Names of the programs that run with a file of this folder on their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # ended meanwhile
                continue
            if any(str(folder).encode() in word for word in words):
                found |= {name for name in ("slurmctld", "slurmd", "munged", "sshd") if name in str(words)}
    return found
