import json
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cache
from hashlib import blake2b
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fw_train.data.order import (
    BLOCK_STEPS,
    SampleOrder,
    StepIds,
    Stream,
    accumulation_steps,
    change_global_batch,
    checked_segments,
    rank_slice,
)

PlainStep = tuple[int, list[int], list[int]]  # stream, ids, positions
Segments = list[tuple[int, int]]

MIX = [Stream("indoor/16x16x5", 30, 2.0), Stream("outdoor/16x16x5", 7, 1.0), Stream("outdoor/16x32x5", 100, 0.5)]

seeds = st.integers(0, 2**40)
batches = st.integers(1, 40)
mixes = st.lists(
    st.tuples(st.integers(1, 60), st.one_of(st.just(0.0), st.floats(0.01, 10))), min_size=1, max_size=4
).map(lambda pairs: [Stream(f"s{i}", size, weight + (i == 0)) for i, (size, weight) in enumerate(pairs)])


@st.composite
def segment_lists(draw: st.DrawFn) -> Segments:
    """One to three segments within the first 40 steps."""
    starts = draw(st.sets(st.integers(1, 40), max_size=2))
    return [(start, draw(batches)) for start in sorted({0, *starts})]


def splitmix64(seed: int) -> Iterator[int]:
    """The published generator, in Python's integers."""
    state = seed
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        yield z ^ (z >> 31)


def reference_steps(seed: int, streams: list[Stream], segments: Segments) -> Iterator[PlainStep]:
    """The order as its definition reads, one step after another, without NumPy."""

    def generator(purpose: str) -> Iterator[int]:
        return splitmix64(int.from_bytes(blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little"))

    def endless(stream: Stream) -> Iterator[int]:
        passes = 0
        while True:
            hashes = list(islice(generator(f"{stream.name}/{passes}"), stream.size))
            yield from sorted(range(stream.size), key=hashes.__getitem__)
            passes += 1

    sequences = {stream.name: endless(stream) for stream in streams}
    total = sum(Fraction(stream.weight) for stream in streams)
    position = 0
    for step, draw in enumerate(generator("draws")):
        u, share = Fraction(draw >> 1, 2**63), Fraction(0)
        for stream in sorted(streams):
            share += Fraction(stream.weight) / total
            if u < share:
                break
        count = max((first_step, size) for first_step, size in segments if first_step <= step)[1]
        ids = [next(sequences[stream.name]) for _ in range(count)]
        yield streams.index(stream), ids, list(range(position, position + count))
        position += count


def plain(step_ids: StepIds) -> PlainStep:
    return step_ids.stream, step_ids.ids.tolist(), step_ids.positions.tolist()


def steps_of(order: SampleOrder, steps: Iterable[int]) -> list[PlainStep]:
    return [plain(order.step_ids(step)) for step in steps]


def sequence_per_stream(order: SampleOrder, steps: Iterable[int]) -> list[list[int]]:
    """Everything each stream gave during `steps`, in order."""
    given_ids: list[list[int]] = [[] for _ in order.streams]
    for stream, ids, _ in steps_of(order, steps):
        given_ids[stream] += ids
    return given_ids


def assert_exactly_once_per_pass(order: SampleOrder, steps: Iterable[int]) -> None:
    for stream, ids in zip(order.streams, sequence_per_stream(order, steps), strict=True):
        for start in range(0, len(ids), stream.size):
            part = ids[start : start + stream.size]
            assert len(set(part)) == len(part)
            assert set(part) <= set(range(stream.size))


def train(order: SampleOrder, steps: Iterable[int], world: int, micro_batch: int, accumulate: int) -> list[PlainStep]:
    """What simulated ranks read in each step, rank after rank; every rank has an order of its own."""
    ranks = [SampleOrder(order.seed, order.streams, order.segments) for _ in range(world)]
    seen: list[PlainStep] = []
    for step in steps:
        ids: list[int] = []
        positions: list[int] = []
        for rank, own in enumerate(ranks):
            for micro_step in range(accumulate):
                drawn = own.step_ids(step)
                part = rank_slice(
                    len(drawn.ids),
                    rank=rank,
                    world=world,
                    micro_batch=micro_batch,
                    accumulate=accumulate,
                    micro_step=micro_step,
                )
                assert len(drawn.ids[part]) == micro_batch
                ids += drawn.ids[part].tolist()
                positions += drawn.positions[part].tolist()
        seen.append((own.step_ids(step).stream, ids, positions))
    return seen


def test_the_generator_is_the_published_one() -> None:
    assert list(islice(splitmix64(1234567), 3)) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_golden_ids() -> None:
    order = SampleOrder(2024, MIX, [(0, 4), (3, 6)])
    assert steps_of(order, range(6)) == [
        (1, [0, 2, 5, 6], [0, 1, 2, 3]),
        (0, [4, 2, 20, 8], [4, 5, 6, 7]),
        (0, [23, 22, 1, 5], [8, 9, 10, 11]),
        (0, [13, 17, 28, 24, 16, 6], [12, 13, 14, 15, 16, 17]),
        (1, [3, 4, 1, 5, 3, 6], [18, 19, 20, 21, 22, 23]),  # the last three of one pass, the first three of the next
        (0, [19, 10, 29, 12, 11, 3], [24, 25, 26, 27, 28, 29]),
    ]


def test_types_and_shapes() -> None:
    stream, ids, positions = SampleOrder(0, MIX, [(0, 4)]).step_ids(5)
    assert isinstance(stream, int)
    assert (ids.dtype, positions.dtype) == (np.int64, np.int64)
    assert (ids.shape, positions.shape) == ((4,), (4,))


@given(seeds, mixes, segment_lists())
@settings(max_examples=60, deadline=None)
def test_equals_the_definition(seed: int, streams: list[Stream], segments: Segments) -> None:
    order = SampleOrder(seed, streams, segments)
    reference = reference_steps(seed, streams, segments)
    assert steps_of(order, range(50)) == list(islice(reference, 50))


@given(seeds, mixes, segment_lists())
@settings(max_examples=60, deadline=None)
def test_every_sample_exactly_once_per_pass_and_every_position_once(
    seed: int, streams: list[Stream], segments: Segments
) -> None:
    order = SampleOrder(seed, streams, segments)
    assert_exactly_once_per_pass(order, range(60))
    positions = [p for _, _, step_positions in steps_of(order, range(60)) for p in step_positions]
    assert positions == list(range(len(positions)))


@given(seeds, st.integers(20, 200), batches)
@settings(max_examples=30, deadline=None)
def test_three_passes_have_three_orders(seed: int, size: int, global_batch: int) -> None:
    order = SampleOrder(seed, [Stream("a", size, 1.0)], [(0, global_batch)])
    (ids,) = sequence_per_stream(order, range(-(-3 * size // global_batch)))
    passes = [tuple(ids[i * size : (i + 1) * size]) for i in range(3)]
    assert all(sorted(one_pass) == list(range(size)) for one_pass in passes)
    assert len({*passes, tuple(range(size))}) == 4


def test_a_permutation_has_no_favourite_place() -> None:
    # Chi-squared over where id 0 of 10 lands in 2,000 passes: 9 degrees of freedom, p = 1e-4 at 33.7.
    order = SampleOrder(3, [Stream("a", 10, 1.0)], [(0, 10)])
    places = np.bincount([ids.index(0) for _, ids, _ in steps_of(order, range(2000))], minlength=10)
    assert ((places - 200) ** 2 / 200).sum() < 33.7


def test_seed_and_name_change_the_order() -> None:
    def ids(seed: int, name: str) -> list[int]:
        return plain(SampleOrder(seed, [Stream(name, 50, 1.0)], [(0, 50)]).step_ids(0))[1]

    assert len({tuple(ids(0, "a")), tuple(ids(1, "a")), tuple(ids(0, "b"))}) == 3


@given(seeds, mixes)
@settings(max_examples=20, deadline=None)
def test_listing_the_streams_in_another_order_changes_nothing(seed: int, streams: list[Stream]) -> None:
    forward, backward = SampleOrder(seed, streams, [(0, 5)]), SampleOrder(seed, streams[::-1], [(0, 5)])
    for step in range(20):
        (i, ids, positions), (j, *others) = plain(forward.step_ids(step)), plain(backward.step_ids(step))
        assert j == len(streams) - 1 - i
        assert others == [ids, positions]


@given(seeds, st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_any_factorisation_sees_the_global_sequence(seed: int, world: int, micro_batch: int, accumulate: int) -> None:
    order = SampleOrder(seed, MIX, [(0, world * micro_batch * accumulate)])
    assert train(order, range(5), world, micro_batch, accumulate) == steps_of(order, range(5))


def test_64_ranks_and_8_ranks_with_accumulation_see_the_same_samples() -> None:
    order = SampleOrder(1, MIX, [(0, 64)])
    assert train(order, range(3), 64, 1, 1) == train(order, range(3), 8, 1, 8) == train(order, range(3), 8, 4, 2)


def test_the_part_of_a_rank_is_contiguous_over_its_micro_steps() -> None:
    layout = {"world": 4, "micro_batch": 2, "accumulate": 3}
    parts = [rank_slice(24, rank=1, micro_step=micro_step, **layout) for micro_step in range(3)]
    assert parts == [slice(6, 8), slice(8, 10), slice(10, 12)]


@given(seeds, st.lists(st.integers(1, 20), min_size=2, max_size=2).map(sorted))
@settings(max_examples=15, deadline=None)
def test_moving_from_64_to_112_ranks_and_on_to_8_at_any_step_changes_nothing(seed: int, moves: list[int]) -> None:
    order = SampleOrder(seed, [Stream("a", 3_000, 1.0)], [(0, 448)])  # a pass takes 6.7 steps
    first, second = moves
    moved = (
        train(order, range(first), 64, 7, 1)
        + train(order, range(first, second), 112, 2, 2)
        + train(order, range(second, 22), 8, 28, 2)
    )
    assert moved == steps_of(order, range(22))
    assert_exactly_once_per_pass(order, range(22))


@given(seeds, st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_changing_the_global_batch_neither_repeats_nor_skips(seed: int, step: int) -> None:
    streams = [Stream("a", 1_500, 1.0), Stream("b", 700, 1.0)]
    before = SampleOrder(seed, streams, [(0, 64)])
    after = SampleOrder(seed, streams, change_global_batch(before.segments, step, 112))
    assert after.segments == ((0, 64), (step, 112))
    assert steps_of(after, range(step)) == steps_of(before, range(step))
    assert [len(after.step_ids(s).ids) for s in (step - 1, step)] == [64, 112]
    assert_exactly_once_per_pass(after, range(60))
    # The sequence of each stream is the same one, only cut elsewhere.
    for uncut, cut in zip(sequence_per_stream(before, range(60)), sequence_per_stream(after, range(60)), strict=True):
        shared = min(len(uncut), len(cut))
        assert uncut[:shared] == cut[:shared]


@given(seeds, mixes, segment_lists(), st.lists(st.integers(1, 60), min_size=2, max_size=2))
@settings(max_examples=40, deadline=None)
def test_two_resumes_equal_the_uninterrupted_run(
    seed: int, streams: list[Stream], segments: Segments, kills: list[int]
) -> None:
    uninterrupted = steps_of(SampleOrder(seed, streams, segments), range(70))
    first, second = sorted(kills)
    resumed: list[PlainStep] = []
    for steps in (range(first), range(first, second), range(second, 70)):
        saved = json.loads(json.dumps({"segments": checked_segments(segments)}))
        resumed += steps_of(SampleOrder(seed, streams, saved["segments"]), steps)
    assert resumed == uninterrupted


FAR_SEGMENTS = [(0, 3), (BLOCK_STEPS - 1, 5), (BLOCK_STEPS + 7, 2), (2 * BLOCK_STEPS, 4)]


@cache
def walked() -> list[PlainStep]:
    """The reference over three blocks of draws, with segments that change in them and at their ends."""
    return list(islice(reference_steps(11, MIX, FAR_SEGMENTS), 3 * BLOCK_STEPS + 1))


@given(st.lists(st.integers(0, 3 * BLOCK_STEPS), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_any_step_in_any_sequence_equals_walking_there(steps: list[int]) -> None:
    order = SampleOrder(11, MIX, FAR_SEGMENTS)
    assert steps_of(order, steps) == [walked()[step] for step in steps]


def test_walking_over_the_ends_of_blocks() -> None:
    order = SampleOrder(11, MIX, FAR_SEGMENTS)
    near = [block * BLOCK_STEPS + offset for block in (1, 2) for offset in range(-20, 20)]
    assert steps_of(order, near) == [walked()[step] for step in near]


def test_a_pass_of_five_million_and_a_resume_in_the_middle() -> None:
    stream = Stream("a", 5_000_000, 1.0)
    order = SampleOrder(0, [stream], [(0, 5_000)])
    one_pass = np.concatenate([order.step_ids(step).ids for step in range(1_000)])
    assert np.array_equal(np.sort(one_pass), np.arange(5_000_000))
    resumed = SampleOrder(0, [stream], [(0, 5_000)]).step_ids(600)
    assert np.array_equal(resumed.ids, one_pass[3_000_000:3_005_000])


def test_weights_are_the_shares_of_the_steps() -> None:
    streams = [
        Stream("a", 10, 6.0),
        Stream("b", 1_000, 3.0),
        Stream("c", 5, 0.0),
        Stream("d", 3, 1.0),
        Stream("e", 9, 0.0),
    ]
    order = SampleOrder(1, streams, [(0, 1)])
    steps = 20_000
    drawn = np.bincount([order.step_ids(step).stream for step in range(steps)], minlength=5)
    shares = np.array([0.6, 0.3, 0.0, 0.1, 0.0])
    assert np.all(np.abs(drawn - steps * shares) <= 4 * np.sqrt(steps * shares * (1 - shares)))


def test_weights_are_relative() -> None:
    doubled = [stream._replace(weight=stream.weight * 3) for stream in MIX]
    assert steps_of(SampleOrder(0, MIX, [(0, 4)]), range(30)) == steps_of(SampleOrder(0, doubled, [(0, 4)]), range(30))


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ([], "no stream"),
        ([Stream("a", 0, 1.0)], "'a' has 0 samples"),
        ([Stream("a", 1, -0.5)], "'a' has weight -0.5"),
        ([Stream("a", 1, float("nan"))], "weight nan"),
        ([Stream("a", 1, float("inf"))], "weight inf"),
        ([Stream("a", 1, 0.0), Stream("b", 1, 0.0)], "all 0"),
        ([Stream("a", 1, 1.0), Stream("b", 1, 1.0), Stream("a", 2, 1.0)], r"names \['a'\] are given more than once"),
    ],
)
def test_wrong_streams(streams: list[Stream], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(0, streams, [(0, 1)])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "begin at step 0"),
        ([(1, 64)], "begin at step 0"),
        ([(0, 64), (9, 1), (5, 2)], "ascending"),
        ([(0, 64), (5, 1), (5, 2)], "ascending"),
        ([(0, 0)], "at least 1"),
        ([(0, 64), (7, -1)], "at least 1"),
        ([(0, 64.0)], "whole numbers"),
        ([(0, True)], "whole numbers"),
        ([0, 64], "whole numbers"),
        ([(0, 64, 1)], "whole numbers"),
    ],
)
def test_wrong_segments(segments: Segments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(0, MIX, segments)


def test_negative_step() -> None:
    with pytest.raises(ValueError, match="step -1"):
        SampleOrder(0, MIX, [(0, 1)]).step_ids(-1)


def test_a_world_that_does_not_fit_lists_those_that_do() -> None:
    assert accumulation_steps(112, 8, 1) == 14
    with pytest.raises(ValueError, match=r"64 .* world 12 x micro_batch 1; .* one of \[1, 2, 4, 8, 16, 32, 64\] GPUs"):
        accumulation_steps(64, 12, 1)
    with pytest.raises(ValueError, match=r"micro_batch 2 use one of \[1, 2, 4, 7, 8, 14, 28, 56\] GPUs"):
        accumulation_steps(112, 112, 2)
    with pytest.raises(ValueError, match=r"micro_batch 5, .* use a micro_batch of \[1, 2, 4, 8, 16, 32, 64\]"):
        accumulation_steps(64, 8, 5)
    with pytest.raises(ValueError, match="at least 1"):
        accumulation_steps(64, 0, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"accumulate": 3},
            r"64 is not world 8 x micro_batch 2 x accumulate 3; accumulate 4 fits, .* \[1, 2, 4, 8, 16, 32\]",
        ),
        ({"accumulate": 8}, "accumulate 4 fits"),
        ({"world": 12}, r"\[1, 2, 4, 8, 16, 32\] GPUs"),
        ({"rank": 8}, r"rank 8 .* 0\.\.7"),
        ({"rank": -1}, "rank -1"),
        ({"micro_step": 4}, r"micro_step 4 .* 0\.\.3"),
    ],
)
def test_wrong_rank_slices(wrong: dict[str, int], message: str) -> None:
    layout = {"rank": 0, "world": 8, "micro_batch": 2, "accumulate": 4, "micro_step": 0}
    with pytest.raises(ValueError, match=message):
        rank_slice(64, **(layout | wrong))


def test_changing_the_global_batch() -> None:
    assert change_global_batch([(0, 64)], 10, 64) == ((0, 64),)
    assert change_global_batch([(0, 64), (10, 112)], 10, 128) == ((0, 64), (10, 128))  # no step was taken with 112
    assert change_global_batch([(0, 64), (10, 112)], 10, 64) == ((0, 64),)
    assert change_global_batch([(0, 64)], 0, 8) == ((0, 8),)
    with pytest.raises(ValueError, match="changed at step 10 already"):
        change_global_batch([(0, 64), (10, 112)], 9, 64)
    with pytest.raises(ValueError, match="at least 1"):
        change_global_batch([(0, 64)], 5, 0)
