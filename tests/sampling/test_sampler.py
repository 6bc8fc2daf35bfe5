"""The sampler against an equation whose solution is known, and on a network: order, convergence, guidance, repeatability."""

import math
from itertools import pairwise

import pytest
import torch

from fw_train.build import build_model
from fw_train.flow import draw_noise, sampling_grid
from fw_train.sampling.generate import SamplerParams, generate
from fw_train.sampling.guidance import Guidance, guided_velocity
from fw_train.sampling.sampler import integrate
from samples import make_batch, tiny_params


def known_velocity(x, s):
    """Of x(s) = x(1) exp(s^2 - 1)."""
    return 2 * s * x


def error(solver, steps):
    start = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return float((integrate(known_velocity, start, levels, solver) - start / math.e).abs().max())


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_solvers_order(solver, order):
    errors = [error(solver, steps) for steps in (8, 16, 32)]
    measured = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert measured == pytest.approx([order] * 2, abs=0.25)


def test_each_solver_asks_as_often_as_it_says():
    for solver, calls in (("euler", 3), ("heun", 6)):
        seen = []
        integrate(lambda x, s, seen=seen: seen.append(float(s)) or x, torch.zeros(1, 2), sampling_grid(3, 5.0), solver)
        assert len(seen) == calls


def test_euler_takes_a_straight_path_to_its_end_in_one_step():
    noise, data = torch.randn(1, 4), torch.randn(1, 4)
    torch.testing.assert_close(integrate(lambda x, s: noise - data, noise, sampling_grid(1), "euler"), data)


class Counted(torch.nn.Module):
    """Counts the passes of a network."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, batch, **wanted):
        self.passes += 1
        return self.inner(batch, **wanted)


@pytest.fixture(scope="module")
def network():
    model = build_model(tiny_params("t2v", interaction=True), torch.float32, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # what is zero at the start would hide the camera
        for name, parameter in model.named_parameters():
            if "camera_adapters" in name or "gamma" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        # Trained networks change slowly with time; fresh ones follow the embedding's fastest waves, 160 in a path.
        model.video.time_embedding[0].weight.unflatten(1, (2, -1))[:, :, :10] = 0
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch(network):
    return make_batch(network.params.wan, seed=3)


@pytest.fixture(scope="module")
def empty(batch):
    return torch.randn(batch.text.shape[1:], generator=torch.Generator().manual_seed(9))


def sample(model, batch, empty, steps=4, text=1.0, camera=1.0, seed=0, solver="euler"):
    params = SamplerParams(steps, solver, 1.0, Guidance(text, camera), seed)
    return generate(model, batch, empty, params, torch.float32).latents


def test_guidance_of_one_is_no_guidance_to_the_bit_and_costs_nothing(network, batch, empty):
    counted = Counted(network)
    guided = sample(counted, batch, empty)

    def bare(x, s):
        noisy = batch.noised(x, (1000 * s).expand(1))
        return network(noisy, velocity=True, geometry=False).velocity

    noise = draw_noise(0, torch.zeros(1, dtype=torch.int64), batch.latents.shape[1:])
    with torch.no_grad():
        assert torch.equal(guided, integrate(bare, noise, sampling_grid(4, 1.0), "euler"))
    assert counted.passes == 4


@pytest.mark.parametrize(("text", "camera", "passes"), [(5.0, 1.0, 2), (1.0, 2.0, 2), (5.0, 2.0, 3), (0.0, 1.0, 2)])
def test_guidance_moves_away_from_what_has_no_text_and_no_camera(network, batch, empty, text, camera, passes):
    counted = Counted(network)
    guidance = Guidance(text, camera)
    s, everyone = torch.tensor(0.6), torch.ones(1, dtype=torch.bool)

    def velocity(of):
        return network(of.noised(batch.latents, torch.tensor([600.0])), velocity=True, geometry=False).velocity

    full, blind = velocity(batch), velocity(batch.drop_camera(everyone))
    mute = velocity(batch.drop_text(everyone, empty))
    expected = full + (text - 1) * (full - mute) + (camera - 1) * (full - blind)
    found = guided_velocity(counted, batch, empty, guidance, torch.float32)(batch.latents, s)
    torch.testing.assert_close(found, expected)
    assert counted.passes == guidance.passes == passes
    assert not torch.allclose(full, mute)
    assert not torch.allclose(full, blind)


def test_the_seed_decides_everything(network, batch, empty):
    first = sample(network, batch, empty)
    torch.randn(7)  # whatever else draws numbers
    assert torch.equal(first, sample(network, batch, empty))
    assert not torch.equal(first, sample(network, batch, empty, seed=1))


def test_more_steps_converge(network, batch, empty):
    """The distance to 200 steps halves, at least nearly, with every doubling."""
    end = sample(network, batch, empty, steps=200)
    distances = [float((sample(network, batch, empty, steps=n) - end).norm()) for n in (4, 8, 16, 32)]
    assert all(finer < 0.65 * coarser for coarser, finer in pairwise(distances)), distances
    heun = float((sample(network, batch, empty, steps=16, solver="heun") - end).norm())
    assert heun < distances[2]


def test_a_sample_that_overflows_is_an_error(network, batch, empty):
    with pytest.raises(ValueError, match="not finite; lower --guidance"):
        sample(network, batch, empty, text=1e38)
