import hashlib
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fw_train import flow

LATENT = (16, 3, 4, 6)  # C F h w


def draw(position: list[int], latent_shape: tuple[int, ...] = LATENT, seed: int = 1234, shift: float = 5) -> flow.Draw:
    places = torch.tensor(position)
    return flow.draw_sample_noise(seed, places, latent_shape, shift=shift, camera_drop=0.17, text_drop=0.1)


def test_a_batch_draws_what_its_samples_draw_alone_in_any_order() -> None:
    together, three, seven, swapped = draw([3, 7]), draw([3]), draw([7]), draw([7, 3])
    for name in flow.Draw._fields:
        both = getattr(together, name)
        assert torch.equal(both, torch.cat([getattr(three, name), getattr(seven, name)])), name
        assert torch.equal(both, getattr(swapped, name).flip(0)), name
    assert not torch.equal(three.noise, seven.noise)


def test_nothing_drawn_before_matters() -> None:
    torch.manual_seed(1)
    first = draw([3])
    state = torch.get_rng_state()
    draw([4, 5])
    torch.manual_seed(2)
    again = draw([3])
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.s, again.s)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator must be left alone"


def test_seeds_and_positions_do_not_run_into_each_other() -> None:
    assert not torch.equal(draw([3], seed=1).noise, draw([3], seed=2).noise)
    assert draw([1], seed=11).s != draw([11], seed=1).s  # "11" + "1" against "1" + "11"


def test_the_streams_of_one_sample_are_independent() -> None:
    positions = list(range(4000))
    small, other = draw(positions, (2,)), draw(positions, (1, 3))
    for name in ("s", "timestep", "camera_dropped", "text_dropped"):
        assert torch.equal(getattr(small, name), getattr(other, name)), f"{name} depends on the latent shape"
    dropped_both = (small.camera_dropped & small.text_dropped).float().mean()
    assert dropped_both == pytest.approx(0.17 * 0.1, abs=0.008)
    # Ranks of s, whose own distribution is skewed.
    rank = small.s.argsort().argsort().float()
    streams = torch.stack([rank, small.camera_dropped.float(), small.text_dropped.float(), small.noise[:, 0]])
    off_diagonal = torch.corrcoef(streams) - torch.eye(len(streams))
    assert off_diagonal.abs().max() < 0.06


def test_golden_values() -> None:
    golden = draw([3, 7, 2**40], (2, 3))
    # The hash is exact everywhere, so s and the decisions are too; noise may differ in its last bits.
    assert golden.s.tolist() == pytest.approx([0.996571660, 0.981350183, 0.571813166], abs=1e-7)
    assert golden.camera_dropped.tolist() == [False, False, False]
    assert golden.text_dropped.tolist() == [True, False, False]
    assert golden.noise[0, 0].tolist() == pytest.approx([0.691846728, 1.137514591, -0.366313249], abs=1e-5)
    assert golden.noise[2, 1].tolist() == pytest.approx([-1.719466805, -0.034355745, -1.526011705], abs=1e-5)


def test_s_is_the_shifted_hash() -> None:
    digest = hashlib.blake2b(b"1234/3/s", digest_size=8).digest()
    u = int.from_bytes(digest, "little") / 2**64
    assert draw([3]).s.item() == pytest.approx(5 * u / (1 + 4 * u), abs=1e-7)
    assert draw([3], shift=1.0).s.item() == pytest.approx(u, abs=1e-7)


def test_statistics_of_a_training_run() -> None:
    many = draw(list(range(20000)), (2,))
    assert many.s.median().item() == pytest.approx(0.833, abs=0.01)
    assert (many.s < 0.3).float().mean().item() == pytest.approx(0.079, abs=0.006)
    assert (many.s >= 0).all()
    assert (many.s <= 1).all()
    assert many.camera_dropped.float().mean().item() == pytest.approx(0.17, abs=0.01)
    assert many.text_dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert many.noise.mean().item() == pytest.approx(0, abs=0.02)
    assert many.noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 500)])
def test_certain_dropout_decisions(probability: float, expected: int) -> None:
    drawn = flow.draw_sample_noise(0, torch.arange(500), (1,), camera_drop=probability, text_drop=probability)
    assert drawn.camera_dropped.sum() == drawn.text_dropped.sum() == expected


def test_fixed_level_validation_uses_the_same_noise() -> None:
    assert torch.equal(flow.draw_noise(1234, torch.tensor([3, 7]), LATENT), draw([3, 7]).noise)


def test_timesteps_stay_distinct_in_fp32_and_collapse_in_bf16() -> None:
    s = flow.sampling_grid(1000, shift=5.0)[:-1]
    timesteps = flow.to_timestep(s)
    assert timesteps.dtype == torch.float32
    assert timesteps.unique().numel() == 1000
    assert timesteps.bfloat16().unique().numel() == 294
    drawn = draw([3, 7])
    assert drawn.s.dtype == drawn.timestep.dtype == drawn.noise.dtype == torch.float32
    assert torch.equal(drawn.timestep, drawn.s * 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_noise_levels_are_refused(dtype: torch.dtype) -> None:
    s, x = torch.tensor([0.5], dtype=dtype), torch.zeros(1, 2)
    for use in (lambda: flow.to_timestep(s), lambda: flow.mix(x, x, s), lambda: flow.euler_step(x, x, s, s)):
        with pytest.raises(ValueError, match="must stay fp32"):
            use()


def test_path_ends_and_direction() -> None:
    x0, noise = torch.full((2, 1, 1, 1, 2), 3.0), torch.full((2, 1, 1, 1, 2), -1.0)
    x_t = flow.mix(x0, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[1], noise[1])
    assert flow.mix(x0, noise, torch.tensor(0.25)).unique().tolist() == [2.0]  # 0.75 * 3 - 0.25
    assert flow.velocity_target(x0, noise).unique().tolist() == [-4.0]  # noise - x0, not its negative


def test_half_precision_latents_are_mixed_in_fp32() -> None:
    x0, noise = torch.ones(1, 2, dtype=torch.bfloat16), torch.full((1, 2), 2.0, dtype=torch.bfloat16)
    s = torch.tensor([0.001])
    assert flow.mix(x0, noise, s).dtype == torch.float32
    assert flow.mix(x0, noise, s).tolist() == [[pytest.approx(1.001, abs=1e-6)] * 2]
    assert flow.velocity_target(x0, noise).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_along_the_exact_velocity_recovers_the_data(steps: int) -> None:
    x0 = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    noise = draw([3, 7]).noise
    velocity, grid = flow.velocity_target(x0, noise), flow.sampling_grid(steps)
    x = noise
    for s_from, s_to in pairwise(grid):
        x = flow.euler_step(x, velocity, s_from, s_to)
        torch.testing.assert_close(x, flow.mix(x0, noise, s_to), atol=1e-5, rtol=0)
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)


def test_every_sample_is_broadcast_to_its_own_level() -> None:
    x0 = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(0))
    drawn = draw([3, 7])
    x_t, velocity = flow.mix(x0, drawn.noise, drawn.s), flow.velocity_target(x0, drawn.noise)
    assert x_t.shape == x0.shape
    torch.testing.assert_close(flow.estimate_x0(x_t, velocity, drawn.s), x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(flow.euler_step(x_t, velocity, drawn.s, torch.zeros(2)), x0, atol=1e-5, rtol=0)
    alone = flow.mix(x0[1:], drawn.noise[1:], drawn.s[1:])
    assert torch.equal(x_t[1:], alone)


def test_sampling_grid() -> None:
    grid = flow.sampling_grid(4, shift=5.0)
    assert grid.tolist() == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0])
    assert flow.sampling_grid(4, shift=1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert (flow.sampling_grid(1000).diff() < 0).all()


def mix_with(s: Tensor) -> Tensor:
    return flow.mix(torch.zeros(2, 3), torch.zeros(2, 3), s)


def test_errors_name_the_values() -> None:
    with pytest.raises(ValueError, match=r"position must be int64 \[B\], got torch.int32 \(1,\)"):
        flow.draw_noise(0, torch.zeros(1, dtype=torch.int32), (1,))
    with pytest.raises(ValueError, match="shift must be positive, got 0"):
        draw([1], shift=0)
    with pytest.raises(ValueError, match=r"text_drop must be a probability, got 1\.5"):
        flow.draw_sample_noise(0, torch.tensor([1]), (1,), camera_drop=0, text_drop=1.5)
    with pytest.raises(ValueError, match=r"noise levels \(3,\) do not fit x \(2, 3\)"):
        mix_with(torch.zeros(3))
    with pytest.raises(ValueError, match="at least one step, got 0"):
        flow.sampling_grid(0)
