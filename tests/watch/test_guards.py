import json
import math
import random

import pytest
import torch

from fw_train.watch import guards
from fw_train.watch.guards import SpikeGuard, Stragglers, weights_fingerprint

GOLDEN = "2da2a0dca55120f84c7bad087a6f516007e02d40f2b84b9d2c3f58b763f2af23"


def noisy(count, seed=0, scale=0.1):
    draw = random.Random(seed)
    return [1 + scale * draw.gauss(0, 1) for _ in range(count)]


class TestSpikeGuard:
    def test_a_spike_is_named_with_its_numbers_and_does_not_move_the_median(self):
        guard = SpikeGuard(window=50, deviations=6, max_bad=3)
        assert [guard.judge(loss) for loss in noisy(40)] == [""] * 40
        for _ in range(2):
            assert guard.judge(1e6).startswith("the loss 1e+06 lies above ")
        assert guard.bad == 2
        assert not guard.too_many
        assert guard.judge(math.nan) == "the loss is nan"
        assert guard.too_many
        assert guard.judge(1.0) == ""
        assert guard.bad == 0

    def test_the_limit_is_the_median_plus_robust_deviations(self):
        guard = SpikeGuard(window=100, deviations=10, max_bad=3)
        for loss in [1.0, 2.0, 3.0, 4.0, 5.0] * 8:
            guard.judge(loss)
        limit = 3 + 10 * 1.4826 * 1  # median 3, median deviation 1
        assert guard.judge(limit + 1e-6) != ""
        assert guard.judge(limit - 1e-6) == ""
        assert guard.judge(-1e6) == ""  # better than usual

    def test_it_waits_until_it_knows_what_is_usual_but_never_takes_what_is_not_finite(self):
        guard = SpikeGuard(window=200, deviations=6, max_bad=5)
        assert guard.judge(math.inf) == "the loss is inf"
        for loss in noisy(19):
            assert guard.judge(loss) == ""
        assert guard.judge(50.0) == ""  # the twentieth: nothing to compare with
        assert guard.judge(50.0) != ""

    def test_ripples_on_a_flat_window_are_no_spikes(self):
        guard = SpikeGuard(window=50, deviations=20, max_bad=5)
        for _ in range(50):
            guard.judge(0.5)
        assert guard.judge(0.55) == ""
        assert guard.judge(0.61) != ""

    def test_no_deviations_means_no_guard(self):
        guard = SpikeGuard(window=50, deviations=0, max_bad=1)
        assert [guard.judge(loss) for loss in [*noisy(30), 1e9]] == [""] * 31
        assert guard.judge(math.nan) != ""

    def test_a_small_window_judges_once_it_is_full(self):
        guard = SpikeGuard(window=4, deviations=6, max_bad=1)
        for loss in (1.0, 1.1, 0.9, 1.0):
            assert guard.judge(loss) == ""
        assert guard.judge(100.0) != ""

    def test_an_overruled_step_leaves_no_trace_but_counts(self):
        guard, same = (SpikeGuard(window=50, deviations=6, max_bad=2) for _ in range(2))
        for loss in noisy(30):
            guard.judge(loss)
            same.judge(loss)
        same.judge(math.nan)
        guard.judge(1.0)
        assert guard.overrule("the gradient is inf") == "the gradient is inf"
        assert guard.state() == same.state()
        guard.judge(1.0)
        guard.overrule("again")
        assert guard.too_many

    def test_a_restored_guard_goes_on_bit_for_bit(self):
        guard, restored = (SpikeGuard(window=30, deviations=3, max_bad=9) for _ in range(2))
        losses = [math.exp(loss) for loss in noisy(200, seed=3, scale=1.0)]
        for loss in [*losses[:100], 1e9]:
            guard.judge(loss)
        restored.restore(json.loads(json.dumps(guard.state())))
        assert restored.state() == guard.state()
        assert restored.bad == 1
        assert [restored.judge(loss) for loss in losses[100:]] == [guard.judge(loss) for loss in losses[100:]]


class TestStragglers:
    def test_a_rank_that_becomes_slow_is_named_within_twenty_steps_and_again_after_a_hundred(self):
        stragglers = Stragglers(4)
        named = []
        for step in range(300):
            seconds = [0.4, 0.41, 0.6 if step >= 50 else 0.4, 0.39]
            named += [(step, slow.rank) for slow in stragglers.add(step, seconds)]
        first = named[0][0]
        assert 50 < first < 70
        assert named == [(first, 2), (first + 100, 2), (first + 200, 2)]

    def test_of_two_ranks_the_slower_one_is_named(self):
        stragglers = Stragglers(2)
        named = [slow for step in range(20) for slow in stragglers.add(step, [0.2, 0.3])]
        assert [str(slow) for slow in named] == ["rank 1 is slow: 0.3 s of its own a step, 0.2 s is usual"]

    @pytest.mark.parametrize("seconds", [[0.4, 0.5, 0.45], [0.02, 0.05, 0.02]])
    def test_small_differences_and_those_of_short_steps_are_not_named(self, seconds):
        stragglers = Stragglers(3)
        assert not [slow for step in range(50) for slow in stragglers.add(step, seconds)]

    def test_a_day_of_noise_names_nobody(self):
        """8,640 steps of ten seconds, every one with 15 % of noise, and now and then a rank that stalls for two steps."""
        draw, stragglers = random.Random(1), Stragglers(8)
        for step in range(8640):
            seconds = [10 * math.exp(0.15 * draw.gauss(0, 1)) for _ in range(8)]
            if step % 40 < 2:
                seconds[step // 40 % 8] *= 5
            assert stragglers.add(step, seconds) == []


class TestWeightsFingerprint:
    @pytest.fixture
    def tensors(self, monkeypatch):
        monkeypatch.setattr(guards, "CHUNK", 64)  # several chunks
        draw = torch.Generator().manual_seed(0)
        return {
            "a": torch.randn(5, 31, generator=draw).bfloat16(),  # an odd number of elements
            "b": torch.randn(5, 31, generator=draw).bfloat16(),
            "c": torch.randn(200, generator=draw),
            "d": torch.randn(3, generator=draw).half(),
            "e": torch.randn(130, generator=draw).double(),
            "f": torch.arange(7, dtype=torch.uint8),
            "empty": torch.zeros(0, 4),
            "scalar": torch.tensor(2.5, requires_grad=True),
        }

    def test_every_single_bit_counts(self, tensors):
        seen = {weights_fingerprint(tensors)}
        flips = 0
        for name in ("a", "d", "e", "f", "scalar"):
            data = tensors[name].detach().reshape(-1).view(torch.uint8)
            for byte in sorted({*range(10), *range(data.numel() - 10, data.numel())} & {*range(data.numel())}):
                for bit in range(8):
                    data[byte] ^= 1 << bit
                    seen.add(weights_fingerprint({name: tensors[name]}))
                    data[byte] ^= 1 << bit
                    flips += 1
        assert len(seen) == flips + 1

    def test_two_flips_of_the_same_bit_do_not_cancel(self, tensors):
        flat = tensors["c"].view(torch.int32)
        before = weights_fingerprint(tensors)
        for bit in (0, 30, 31):
            mask = torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
            for other in (1, 2, 63, 64, 199):
                flat[0] ^= mask
                flat[other] ^= mask
                assert weights_fingerprint(tensors) != before
                flat[0] ^= mask
                flat[other] ^= mask
        assert weights_fingerprint(tensors) == before

    def test_swapped_elements_tensors_signs_and_shapes_count(self, tensors):
        before = weights_fingerprint(tensors)
        assert weights_fingerprint({**tensors, "a": tensors["b"], "b": tensors["a"]}) != before
        for i, j in ((0, 1), (0, 2), (3, 70), (150, 154)):
            swapped = tensors["a"].flatten().clone()
            swapped[[i, j]] = swapped[[j, i]]
            assert weights_fingerprint({**tensors, "a": swapped.view(5, 31)}) != before
        mirrored = tensors["c"].clone()
        mirrored[0] = -mirrored[1]  # x, -x against -x, x: differ in the highest bits alone
        swapped = mirrored.clone()
        swapped[[0, 1]] = swapped[[1, 0]]
        assert weights_fingerprint({"c": mirrored}) != weights_fingerprint({"c": swapped})
        assert weights_fingerprint({**tensors, "a": tensors["a"].view(31, 5)}) != before
        zeros = torch.zeros(4)
        assert weights_fingerprint({"z": zeros}) != weights_fingerprint({"z": -zeros})

    def test_order_memory_layout_and_place_do_not_count(self, tensors):
        before = weights_fingerprint(tensors)
        assert weights_fingerprint(dict(reversed(tensors.items()))) == before
        column_major = tensors["a"].t().contiguous().t()
        assert not column_major.is_contiguous()
        odd_place = torch.cat((tensors["b"].new_zeros(1), tensors["b"].flatten()))[1:].view(5, 31)
        assert weights_fingerprint({**tensors, "a": column_major, "b": odd_place}) == before

    def test_golden(self):
        tensors = {"x": torch.arange(1000, dtype=torch.float32), "y": torch.linspace(-1, 1, 77).bfloat16()}
        assert weights_fingerprint(tensors) == GOLDEN

    @pytest.mark.gpu
    def test_the_same_on_the_gpu(self, tensors):
        assert weights_fingerprint({name: t.cuda() for name, t in tensors.items()}) == weights_fingerprint(tensors)
