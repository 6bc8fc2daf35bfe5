"""Ranks that meet: in threads over one store, with real connections, real process groups and a real folder."""

import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as c10d

from launch import doctor_network
from launch.doctor_network import Meeting, Missing, connect, gloo_address, look_at_network, reduce_and_time, rounds
from launch.doctor_shared import try_alone, try_rename
from processes import TESTS

CPU = torch.device("cpu")


def look(folder, size=3, leaders=None, absent=()):
    """What each rank sees; `absent` ones never come."""
    store, found = c10d.HashStore(), {}

    def work(rank):
        meeting = Meeting(store, rank, range(size), range(size) if leaders is None else leaders)
        found[rank] = look_at_network(meeting, str(folder), CPU)

    threads = [Thread(target=work, args=(rank,)) for rank in range(size) if rank not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return [found.get(rank) for rank in range(size)]


@pytest.mark.parametrize("players", [[0], [0, 1], [0, 8, 16], list(range(14))])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(players):
    plan = list(rounds(players))
    assert len(plan) <= len(players)
    for pairs in plan:
        busy = list(chain(*pairs))
        assert len(busy) == len(set(busy))
    met = sorted(chain(*plan))
    assert met == [(a, b) for i, a in enumerate(players) for b in players[i + 1 :]]


def test_three_nodes_that_are_well_see_each_other(tmp_path):
    found = look(tmp_path)
    for rank, facts in enumerate(found):
        others = [peer for peer in range(3) if peer != rank]
        assert [r.peer for r in facts.reached] == others
        assert all(r.error == "" and abs(r.offset_s) < 0.1 and 0 < r.round_trip_s < 1 for r in facts.reached)
        assert sorted(r.peer for r in facts.reduced if r.peer is not None) == others
        assert [r.peer for r in facts.reduced].count(None) == 1
        assert all(r.error == "" and r.gb_per_s > 0 for r in facts.reduced)
        assert (facts.shared_error, facts.rename_error, facts.trouble) == ("", "", "")
    assert list(tmp_path.iterdir()) == []


def test_further_ranks_of_a_node_take_part_in_the_whole_alone(tmp_path):
    found = look(tmp_path, size=4, leaders=[0, 2])
    assert [[r.peer for r in facts.reduced] for facts in found] == [[2, None], [None], [0, None], [None]]
    assert [len(facts.reached) for facts in found] == [1, 0, 1, 0]


def test_one_that_never_comes_is_named_by_all(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_network, "GATHER_S", 1.0)
    monkeypatch.setattr(doctor_network, "PAIRS_S", 1.0)
    start = time.monotonic()
    first, second, _ = look(tmp_path, absent=[2])
    assert first.trouble == second.trouble == "rank 2 did not come to `folder` within 1 s"
    assert time.monotonic() - start < 20


def test_a_connection_tells_the_clock_of_the_other_and_whose_it_is():
    server = doctor_network._Server(7)
    port = server.server_address[1]
    reached = connect(7, "127.0.0.1", port)
    assert reached.error == ""
    assert abs(reached.offset_s) < 0.1
    assert connect(3, "127.0.0.1", port).error == "rank 7 answers at its address 127.0.0.1"
    server.shutdown()
    server.server_close()
    assert "refused" in connect(7, "127.0.0.1", port).error
    assert "gives no address" in connect(7, "", port).error


def test_a_clock_that_is_ahead_is_seen(monkeypatch):
    server = doctor_network._Server(7)
    real = time.time_ns
    own = iter(range(1, 100))

    def shifted():  # the server asks second of each three: sent, answered, received
        return real() + (5_000_000_000 if next(own) % 3 == 2 else 0)

    monkeypatch.setattr(doctor_network.time, "time_ns", shifted)
    assert connect(7, "127.0.0.1", server.server_address[1]).offset_s == pytest.approx(5, abs=0.1)
    server.shutdown()


def test_the_address_is_that_of_the_named_interface(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert gloo_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    assert gloo_address() == ""


class Sum:
    """A process group of two whose other rank brings twice this one's numbers."""

    def __init__(self, wrong_at=None):
        self.wrong_at = wrong_at

    def allreduce(self, tensors):
        tensors[0].mul_(3)
        if self.wrong_at is not None:
            tensors[0][self.wrong_at] += 1
        return self

    def wait(self):
        return True


def test_a_wrong_sum_is_seen_wherever_it_is():
    speed, error = reduce_and_time(Sum(), 0, 2, CPU)
    assert speed > 0
    assert error == ""
    for at in (0, 123_456, -1):
        assert "1 of 1048576 sums are wrong" in reduce_and_time(Sum(at), 0, 2, CPU)[1]


def test_the_first_says_no_for_all_when_time_is_up():
    meeting = Meeting(c10d.HashStore(), 0, [0], [0])
    assert meeting.agree("in time", True, [0], time.monotonic() + 5)
    assert not meeting.agree("late", True, [0], time.monotonic() - 1)
    assert not meeting.agree("somebody", False, [0])
    with pytest.raises(Missing, match="rank 4 did not come to `nothing` within 0 s"):
        meeting.get("nothing", 4, 0)


def test_a_folder_of_one_machine(tmp_path):
    assert try_alone(str(tmp_path)) == ""
    assert list(tmp_path.iterdir()) == []
    assert try_alone(str(tmp_path / "not" / "yet")) == ""
    assert list(tmp_path.iterdir()) == []
    assert "cannot be written" in try_alone("/proc/self")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_rename_that_fails_is_seen(tmp_path):
    """A file that something is mounted on cannot be replaced."""
    assert try_rename(tmp_path, "rank-0", "x") == ""
    script = """mount --make-rprivate / && mount --bind "$1/rank-0" "$1/rank-0" && exec "$2" -c "
from pathlib import Path
from launch.doctor_shared import try_rename
print(try_rename(Path('$1'), 'rank-0', 'y'))" """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "-", tmp_path, sys.executable],
        capture_output=True, text=True, check=True, cwd=TESTS.parent,
    )  # fmt: skip
    assert "busy" in done.stdout


def test_a_nonce_that_is_not_there_is_seen(tmp_path, monkeypatch):
    """As for a node that has another folder under the same name."""
    monkeypatch.setattr("launch.doctor_shared.SEEN_S", 0.3)
    see = Path.read_text

    def read_text(path):
        if path.name == "nonce":
            raise FileNotFoundError(2, "No such file or directory")
        return see(path)

    monkeypatch.setattr(Path, "read_text", read_text)
    for facts in look(tmp_path, size=2):
        assert "nonce: No such file or directory" in facts.shared_error
        assert all(r.error == "" for r in facts.reduced)
