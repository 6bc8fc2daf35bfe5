from dataclasses import replace

import pytest
import torch

from fw_train.build import build_model
from fw_train.evaluation.validation import BINS, SEED_APART, predict, validate
from fw_train.flow import draw_noise
from fw_train.losses import LossParams, sample_losses
from samples import make_batch, tiny_params

PARAMS = tiny_params()


@pytest.fixture(scope="module")
def model():
    """One whose geometry branch listens to the camera, which a fresh one does not."""
    made = build_model(PARAMS, torch.float32)
    for block in made.geo_blocks:
        torch.nn.init.normal_(block.pose_adapter[1].weight)
    return made


def clip(index, seed=None):
    batch = make_batch(PARAMS.wan, seed=index if seed is None else seed)
    generator = torch.Generator().manual_seed(100 + index)
    depth = torch.rand(1, 5, 32, 48, generator=generator) + 0.5
    return replace(
        batch, timestep=None, depth=depth, valid=torch.ones_like(depth, dtype=torch.bool),
        points=torch.randn(1, 5, 3, 32, 48, generator=generator), position=torch.tensor([index]), keys=(f"c{index}",),
    )  # fmt: skip


def run(model, clips, all_sum=lambda tensor: tensor, **changes):
    settings = {"seed": 3, "dtype": torch.float32, "geometry": True, "diffusion": True, "all_sum": all_sum} | changes
    return validate(model, iter(clips), **settings)


@pytest.fixture(scope="module")
def results(model):
    return run(model, [(clip(0), True), (clip(1), True)])


def noised(batch, level):
    """What the network is given at a noise level, and the velocity that it should find."""
    noise = draw_noise(3 + SEED_APART, batch.position, batch.latents.shape[1:])
    return batch.noised(
        (1 - level) * batch.latents + level * noise, torch.tensor([1000 * level])
    ), noise - batch.latents


@pytest.mark.parametrize(
    ("case", "level", "camera"),
    [("", 0.1, False), ("_s0.5", 0.5, False), ("_s0.9", 0.9, False), ("_with_camera", 0.1, True)],
)
def test_terms_are_the_guides_at_the_level_of_each_case(model, results, case, level, camera):
    expected = []
    for index in (0, 1):
        noisy, _ = noised(clip(index), level)
        with torch.no_grad():
            prediction = model(noisy if camera else noisy.drop_camera(torch.tensor([True])), velocity=False)
        expected.append(sample_losses(prediction, clip(index), None, LossParams("guide")))
    for term in ("depth", "point", "camera"):
        wanted = torch.stack([getattr(losses, term).value for losses in expected]).mean()
        torch.testing.assert_close(torch.tensor(results.values[f"validation/{term}_loss{case}"]), wanted)


def test_figures_have_these_names_and_no_others(results):
    names = {
        f"validation/{t}_loss{c}" for t in ("depth", "point", "camera") for c in ("", "_s0.5", "_s0.9", "_with_camera")
    }
    assert set(results.values) == names | {"validation/diffusion"}


def test_the_camera_is_hidden_unless_the_case_shows_it(model):
    batch, turned = clip(0), replace(clip(0), pose9=torch.randn(1, 5, 9, generator=torch.Generator().manual_seed(9)))
    with torch.no_grad():
        hidden = [predict(model, b, 0.1, 0, torch.float32, camera=False).depth for b in (batch, turned)]
        seen = [predict(model, b, 0.1, 0, torch.float32, camera=True).depth for b in (batch, turned)]
    assert torch.equal(*hidden)
    assert not torch.equal(*seen)


def test_diffusion_has_ten_bins_on_noise_that_never_changes(model):
    first, again = (run(model, [(clip(0), True)], geometry=False) for _ in range(2))
    assert first == again
    assert len(first.diffusion_bins) == BINS
    assert len(set(first.diffusion_bins)) == BINS
    assert first.values == {"validation/diffusion": pytest.approx(sum(first.diffusion_bins) / BINS)}
    assert run(model, [(clip(0), True)], diffusion=False).diffusion_bins is None


def test_a_bin_is_the_velocitys_error_in_its_middle(model, results):
    for index, error in enumerate(results.diffusion_bins):
        expected = []
        for number in (0, 1):
            noisy, velocity = noised(clip(number), (index + 0.5) / BINS)
            with torch.no_grad():
                expected.append((model(noisy, geometry=False).velocity - velocity).square().mean())
        assert error == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_the_network_gets_its_dtype_and_keeps_no_graph_and_sees_the_camera_where_it_may(model):
    seen, hidden = set(), {False: [], True: []}  # by whether a velocity is asked for

    def watched(noisy, **wanted):
        seen.add((noisy.latents.dtype, torch.is_grad_enabled()))
        hidden[wanted["velocity"]].append(noisy.camera_on is not None and not noisy.camera_on.any())
        return model(noisy.to("cpu", torch.float32), **wanted)

    run(watched, [(clip(0), True)], dtype=torch.bfloat16)
    assert seen == {(torch.bfloat16, False)}
    assert hidden == {False: [True, True, True, False], True: [False] * BINS}


def test_what_nobody_counted_has_no_figure(model):
    assert run(model, [(clip(0), False)]) == ({}, None)


def test_ranks_add_up_and_repeated_clips_do_not_count(model):
    alone = run(model, [(clip(i), True) for i in range(3)])
    vectors = []
    shares = [[(clip(0), True), (clip(2), True)], [(clip(1), True), (clip(2), False)]]
    for share in shares:
        run(model, share, all_sum=lambda tensor: vectors.append(tensor) or tensor)
    together = run(model, shares[0], all_sum=lambda _: torch.stack(vectors).sum(0))
    assert together.values == pytest.approx(alone.values, rel=1e-12)
    assert together.diffusion_bins == pytest.approx(alone.diffusion_bins, rel=1e-12)
