"""What a launch says at its end, from the run's status, its ranks' ends and the hosts that were lost."""

from pathlib import Path

import pytest

from fw_train.run.folder import RunFolder, read_status
from launch.hostfile import Host
from launch.launch_file import Launch, log_file, read_launch, write_launch
from launch.messages import Ended, HostLost, Other, Shown, ended, read, shown
from launch.outcome import Course, judge

HOSTS = (Host("node1", 1), Host("node2.lan", 2))
DONE = tuple(Ended(rank, host, 0, "") for rank, host in enumerate(("node1", "node2", "node2")))


@pytest.fixture
def launch(tmp_path):
    """A launch whose folder an earlier start has left finished."""
    folder = RunFolder.claim(tmp_path)
    folder.status("finished", 5, "")
    folder.release()
    (tmp_path / "logs").mkdir()
    return Launch("ab12", ("c.yaml",), str(tmp_path), folder.token)


def claim(launch, state, reason=""):
    folder = RunFolder.claim(launch.output)
    folder.status(state, 7, reason)
    folder.release()


def write_log(launch, rank, *lines):
    path = log_file(Path(launch.output), rank)
    path.write_text("".join(f"{line}\n" for line in ("of an earlier launch", f"---- launch {launch.id}, on x", *lines)))


def test_what_a_keeper_says_comes_through_pdsh():
    end = Ended(12, "node2", -9, 'the "connection": 1')
    assert read("ab12", f"node2: {ended('ab12', end)}") == end
    assert read("ab12", f"node1: {shown('ab12', 'step 1: loss 2.0')}") == Shown("step 1: loss 2.0")
    assert read("ab12", "node2: @ffff E [1]\n") == Other("node2: @ffff E [1]")
    assert read("ab12", "pdsh@head: node2: ssh exited with exit code 255\n") == HostLost(
        "node2", "ssh exited with exit code 255"
    )
    assert read("ab12", "node1: Traceback (most recent call last):\n") == Other(
        "node1: Traceback (most recent call last):"
    )


def test_a_launch_survives_its_file(tmp_path):
    launch = Launch("ab12", ("c.yaml", "data.sources=[{path: $(x)}]"), "/run", None)
    write_launch(tmp_path / "launch.json", launch)
    assert read_launch(tmp_path / "launch.json") == launch


@pytest.mark.parametrize(
    ("state", "words"), [("finished", "finished at step 7"), ("stopped", "stopped at step 7 (SIGTERM)")]
)
def test_status_decides(launch, state, words):
    claim(launch, state, "SIGTERM")
    assert judge(launch, HOSTS, Course(DONE, (), "")).code == 0
    late = judge(launch, HOSTS, Course((*DONE[:2], Ended(2, "node2", -6, "")), (), ""))
    assert late.code == 0
    assert late.words.startswith(words)
    assert "afterwards, rank 2 on node2 was killed by signal 6 (SIGABRT)" in late.words


def test_exit_codes_alone_are_not_believed(launch):
    """All ranks say 0, and the folder's status is another start's, or none at all."""
    verdict = judge(launch, HOSTS, Course(DONE, (), ""))
    assert verdict.code == 1
    assert "failed before it owned its folder" in verdict.words
    assert read_status(launch.output).state == "finished"  # the earlier start's word stays
    claim(launch, "running")
    assert judge(launch, HOSTS, Course((), ("pdsh: gone",), "")).code == 1
    assert read_status(launch.output) == ("failed", 7, "DeepSpeed or pdsh ended before the ranks")


def test_the_rank_that_failed_is_named_though_others_left_first(launch):
    claim(launch, "failed", "rank 2 failed: ValueError: no such clip")
    write_log(launch, 0, "rank 2 failed: ...; rank 0 ends")
    write_log(launch, 2, *map(str, range(100)), "ValueError: no such clip")
    events = (Ended(0, "node1", 1, ""), Ended(2, "node2", 1, ""), HostLost("node2", "ssh exited with exit code 1"))
    verdict = judge(launch, HOSTS, Course(events, (), ""))
    assert verdict.code == 1
    first, second, *lines = verdict.words.splitlines()
    assert first == "rank 2 on node2 ended with code 1"
    assert second.startswith("the last lines of ")
    assert lines[-2:] == [
        "    ValueError: no such clip",
        "the run failed at step 7: rank 2 failed: ValueError: no such clip",
    ]
    assert lines[0] == "    86"


def test_who_was_killed_is_named_though_others_felt_it_as_their_own_error(launch):
    claim(launch, "failed", "rank 0 failed: connection closed by peer")
    write_log(launch, 1, "step 6")
    events = (Ended(1, "node2", -9, ""), Ended(0, "node1", 1, ""))
    verdict = judge(launch, HOSTS, Course(events, (), ""))
    assert verdict.words.startswith("rank 1 on node2 was killed by signal 9 (SIGKILL)")
    assert "    step 6\n" in verdict.words
    assert "of an earlier launch" not in verdict.words
    assert read_status(launch.output).reason.startswith("rank 1 on node2 was killed by signal 9")


def test_a_lost_host_is_named_with_its_ranks(launch):
    claim(launch, "running")
    write_log(launch, 2, "step 6")
    course = Course((HostLost("node2", "ssh exited with exit code 255"),), (), "not all had ended")
    verdict = judge(launch, HOSTS, course)
    assert verdict.words.startswith("host node2 (ranks 1, 2): ssh exited with exit code 255\nthe last lines of")
    assert read_status(launch.output).state == "failed"


def test_a_host_on_which_nothing_could_start_is_shown_with_what_it_said(launch):
    said = ("node2: bash: line 1: /nowhere/python: No such file",)
    verdict = judge(launch, HOSTS, Course((HostLost("node2", "ssh exited with exit code 127"),), said, ""))
    assert verdict.code == 1
    assert "No such file" in verdict.words
    assert read_status(launch.output).state == "finished"
