import sys
from types import SimpleNamespace

import pytest

from fw_train.identity import this_process
from fw_train.watch.heartbeat import (
    GONE_S,
    Heartbeat,
    Place,
    Seen,
    Trace,
    from_json,
    judge_silence,
    judge_standstill,
    place_from_json,
    place_to_json,
    stack_of,
    to_json,
)  # fmt: skip

HERE = this_process()
THERE = HERE._replace(host="node7", machine="another")
WAITS = ("/app/train.py:9 in train: x", "/lib/torch/distributed/distributed_c10d.py:5 in all_reduce: work.wait()")
WORKS = ("/app/train.py:8 in train: next(batches)", "/app/loader.py:5 in take: queue.get()")
HANG_S, FIRST_STEP_S, SETTLE_S = 60.0, 1800.0, 6.0
NO_TRACE = Trace(None, "")


def seen(rank, idle, step=5, in_step=1, stack=WORKS, begun=5, silent=0.0, process=HERE, left=""):
    place = Place("forward", step, in_step, 100, (f"key{rank}",), begun)
    now = 10_000.0
    return Seen(now - silent, now - idle, Heartbeat(rank, process, 7, place, stack, left))


def standstill(*ranks):
    return judge_standstill(dict(enumerate(ranks)), 10_000.0, HANG_S, FIRST_STEP_S, SETTLE_S)


def silence(*ranks, trace=NO_TRACE, later=0.0):
    return judge_silence(dict(enumerate(ranks)), 10_000.0 + later, HANG_S, FIRST_STEP_S, HERE, lambda _: trace)


def test_who_waits_in_a_collective_is_not_to_blame():
    verdict = standstill(seen(0, 70, stack=WAITS), seen(1, 70, stack=WAITS), seen(2, 65), seen(3, 70, stack=WAITS))
    assert verdict.ranks == (2,)
    assert verdict.headline == "rank 2 hung: nothing done for 65 s (phase forward, step 5, samples key2)"
    assert "loader.py:5 in take: queue.get()" in verdict.report
    assert "ranks 0-1, 3 in phase forward, step 5, /lib/torch/distributed" in verdict.report
    assert verdict.silent == ()  # it can leave by itself


@pytest.mark.parametrize("behind", [{"step": 4, "in_step": 9}, {"in_step": 0}])
def test_who_is_furthest_behind_is_to_blame_where_nobody_is_seen_to_wait(behind):
    verdict = standstill(seen(0, 70), seen(1, 70, **behind), seen(2, 70))
    assert verdict.ranks == (1,)


@pytest.mark.parametrize("stack", [WORKS, WAITS])
def test_all_are_named_where_nothing_tells_them_apart(stack):
    verdict = standstill(seen(0, 70, stack=stack), seen(1, 70, stack=stack))
    assert verdict.ranks == (0, 1)
    assert verdict.report.count(stack[-1]) == 2


def test_a_slow_rank_that_moves_is_not_said_to_hang_however_long_the_others_wait():
    assert standstill(seen(0, 500), seen(1, 20, in_step=0)) is None
    assert standstill(seen(0, 500, stack=WAITS), seen(1, 20)) is None


def test_who_has_waited_for_a_slow_rank_is_not_blamed_when_it_comes():
    """What is known of the one that waited is older than what is known of the one that came."""
    assert standstill(seen(0, 500), seen(1, 1, in_step=2)) is None
    assert standstill(seen(0, 500), seen(1, 1, left="closed")) is None
    assert standstill(seen(0, 500), seen(1, SETTLE_S + 1, in_step=2)).ranks == (0,)


def test_the_first_step_may_take_longer():
    assert standstill(seen(0, 1700, begun=1), seen(1, 1700, begun=1)) is None
    assert standstill(seen(0, 1900, begun=1), seen(1, 1900, begun=1)).ranks == (0, 1)
    assert standstill(seen(0, 70, begun=2), seen(1, 70, begun=2)).ranks == (0, 1)


def test_who_has_taken_leave_is_not_judged():
    assert standstill(seen(0, 70, left="closed")) is None
    assert silence(seen(0, 70, silent=70, left="closed")) is None


def test_a_silent_rank_on_another_machine():
    assert silence(seen(0, 0, silent=59, process=THERE)) is None
    verdict = silence(seen(0, 0), seen(1, 0, silent=61, process=THERE))
    assert verdict.ranks == (1,)
    assert (
        "rank 1 does not answer for 61 s: stopped, swapped out, or its host is gone (phase forward" in verdict.headline
    )
    assert "on node7" in verdict.report
    assert verdict.silent == (THERE,)


def test_a_process_that_has_ended_is_named_soon_but_may_have_said_why_first():
    gone = HERE._replace(pid=2**22 + 1)
    one = seen(0, 0, process=gone)
    assert silence(one) is None
    assert silence(one, later=GONE_S) is None
    assert "has ended without a word" in silence(one, later=GONE_S + 0.1).headline


def test_what_a_silent_rank_left_behind_is_newer_than_its_sign_of_life():
    trace = Trace(Place("backward", 6, 0, 200, ("newer",), 6), "Thread 0x1 (most recent call first):\n  File x")
    verdict = silence(seen(0, 0, silent=61), trace=trace)
    assert "phase backward, step 6, samples newer" in verdict.headline
    assert "File x" in verdict.report
    assert "queue.get" not in verdict.report


def test_a_rank_that_never_appears():
    absent = Seen(10_000.0 - FIRST_STEP_S - 1, 10_000.0)
    assert silence(Seen(10_000.0 - FIRST_STEP_S + 1, 10_000.0)) is None
    assert "rank 1 never appeared in 1800 s" in silence(seen(0, 0), absent).headline


def test_signs_of_life_survive_json():
    heartbeat = seen(3, 0).heartbeat
    assert from_json(to_json(heartbeat)) == heartbeat
    longer, shorter = (place_to_json(Place("data", 1, 2, 3, keys)) for keys in (("a", "b" * 50), ("ü",)))
    assert place_from_json(shorter + longer[len(shorter) :]) == Place("data", 1, 2, 3, ("ü",))


def test_the_observers_own_pause_is_left_out_and_progress_is_what_changes():
    one = seen(0, 50, silent=50)
    one.shift(30)
    assert (one.alive_at, one.moved_at) == (9_980.0, 9_980.0)
    beating = one.heartbeat._replace(number=8)
    one.update(beating, 10_000.0)
    assert (one.alive_at, one.moved_at) == (10_000.0, 9_980.0)
    one.update(beating._replace(place=beating.place._replace(beats=101)), 10_001.0)
    assert (one.alive_at, one.moved_at) == (10_000.0, 10_001.0)


def test_a_stack_ends_with_the_innermost_call_and_its_source():
    stack = stack_of(sys._getframe())
    assert stack[-1].startswith(__file__)
    assert stack[-1].endswith("stack = stack_of(sys._getframe())")
    assert stack_of(None) == ()


def test_a_frame_between_two_lines_is_named_by_its_function():
    here = sys._getframe()
    between = SimpleNamespace(f_code=here.f_code, f_lineno=None, f_back=None)
    assert f":{here.f_code.co_firstlineno} in {here.f_code.co_name}: def test" in stack_of(between)[0]
