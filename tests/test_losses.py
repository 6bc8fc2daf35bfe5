import math
from dataclasses import replace
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from fw_train import losses
from fw_train.batch import DEPTH_KINDS, Batch, DepthKind, Prediction
from fw_train.losses import LossParams

PRESETS = get_args(losses.Preset)
GUIDE, PAPER = LossParams("guide"), LossParams("paper")
B, T, H, W = 2, 5, 9, 12
C1, C2 = 0.01**2, 0.03**2  # of SSIM


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


POSE = noise(B, T, 9, seed=1)
DEPTH = 0.5 + uniform(B, T, H, W, seed=2)
VALID = uniform(B, T, H, W, seed=3) > 0.25
POINTS = noise(B, T, 3, H, W, seed=4)
VELOCITY_TARGET = torch.zeros(B, 16, 2, 3, 4)


def labelled(kind: DepthKind = "metric") -> Batch:
    return Batch(
        latents=torch.zeros(B, 16, 2, 1, 1),
        text=torch.zeros(B, 1, 4),
        pose9=POSE,
        depth=DEPTH,
        valid=VALID,
        points=POINTS,
        depth_kind=(kind,) * B,
        position=torch.tensor([3, 7]),
    )


class Leaves(NamedTuple):
    """What a network predicts for `labelled()`; unlike in `Prediction`, nothing is missing."""

    velocity: Tensor
    depth: Tensor
    points: Tensor
    confidence: Tensor
    cameras: Tensor


def leaves() -> Leaves:
    random = Leaves(
        velocity=noise(B, 16, 2, 3, 4, seed=5),
        depth=0.5 + uniform(B, T, H, W, seed=6),
        points=noise(B, T, 3, H, W, seed=7),
        confidence=1 + uniform(B, T, H, W, seed=8),
        cameras=noise(B, T, 9, seed=9),
    )
    return Leaves(*(x.requires_grad_() for x in random))


def predicted() -> Prediction:
    return Prediction(*leaves())


def losses_of(
    prediction: Prediction, batch: Batch, params: LossParams = GUIDE, diffusion_in_total: bool = True
) -> losses.LossTerms:
    return losses.compute_losses(prediction, batch, VELOCITY_TARGET, params, diffusion_in_total=diffusion_in_total)


def per_sample(prediction: Prediction, batch: Batch, params: LossParams) -> dict[str, losses.PerSample]:
    samples = losses.sample_losses(prediction, batch, VELOCITY_TARGET[: len(batch.latents)], params)
    return {name: term for name, term in samples._asdict().items() if term is not None}


def gradients(parts: Leaves, loss: Tensor) -> Leaves:
    return Leaves(*torch.autograd.grad(loss, parts, allow_unused=True, materialize_grads=True))


def depth_loss(
    prediction: Tensor,
    label: Tensor,
    kind: DepthKind = "metric",
    params: LossParams = PAPER,
    valid: Tensor | None = None,
) -> float:
    valid = torch.ones_like(label, dtype=torch.bool) if valid is None else valid
    return losses.depth_term(prediction, label, valid, kind, params).value.item()


# ---- the sum and its names ----


def test_the_log_has_exactly_these_five_names() -> None:
    terms = losses_of(predicted(), labelled())
    named = terms.named()
    assert set(named) == {"loss/diffusion", "loss/depth_loss", "loss/point_loss", "loss/camera_loss", "loss/total"}
    assert named["loss/depth_loss"] == terms.depth
    assert named["loss/point_loss"] == terms.point
    assert named["loss/camera_loss"] == terms.camera
    assert not any(value.requires_grad for value in named.values())


@pytest.mark.parametrize(
    ("params", "weights"), [(GUIDE, (1, 1, 1)), (PAPER, (1, 1, 3)), (LossParams("paper", 2, 0, 5), (2, 0, 5))]
)
def test_total_is_the_weighted_sum(params: LossParams, weights: tuple[float, float, float]) -> None:
    named = losses_of(predicted(), labelled(), params).named()
    expected = named["loss/diffusion"] + weights[0] * named["loss/depth_loss"]
    expected = expected + weights[1] * named["loss/point_loss"] + weights[2] * named["loss/camera_loss"]
    torch.testing.assert_close(named["loss/total"], expected)
    assert params.weights == weights


def test_a_diffusion_loss_for_the_log_is_not_in_the_total() -> None:
    parts, batch = leaves(), labelled()
    trained = losses_of(Prediction(*parts), batch)
    logged = losses_of(Prediction(*parts), batch, diffusion_in_total=False)
    diffusion = trained.named()["loss/diffusion"]
    assert logged.named()["loss/diffusion"] == diffusion
    assert logged.diffusion is not None
    assert not logged.diffusion.requires_grad
    torch.testing.assert_close(logged.total, trained.total - diffusion)
    assert gradients(parts, logged.total).velocity.abs().max() == 0
    assert gradients(parts, trained.total).velocity.abs().max() > 0
    not_asked = losses_of(Prediction(*parts)._replace(velocity=None), batch, diffusion_in_total=False)
    assert not_asked.total == logged.total
    assert "loss/diffusion" not in not_asked.named()


def test_video_alone() -> None:
    prediction = Prediction(leaves().velocity, None, None, None, None)
    assert set(losses_of(prediction, labelled()).named()) == {"loss/diffusion", "loss/total"}


# ---- all terms ----


@pytest.mark.parametrize("kind", DEPTH_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_perfect_prediction_gives_zero(kind: DepthKind, preset: losses.Preset) -> None:
    batch = replace(labelled(kind), depth=7 / DEPTH + 2 if kind == "affine_disparity" else DEPTH)
    prediction = Prediction(None, DEPTH, POINTS, torch.full_like(DEPTH, 1.5), POSE)
    terms = losses_of(prediction, batch, LossParams(preset, confidence_alpha=0), False)
    assert terms.depth == pytest.approx(0, abs=1e-5)
    assert terms.point == 0
    assert terms.camera == 0


@pytest.mark.parametrize("kind", DEPTH_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_predictions_give_fp32_losses(preset: losses.Preset, kind: DepthKind) -> None:
    half = Leaves(*(x.detach().bfloat16().requires_grad_() for x in leaves()))
    terms = losses_of(Prediction(*half), labelled(kind), LossParams(preset))
    reference = losses_of(Prediction(*(x.float() for x in half)), labelled(kind), LossParams(preset)).named()
    for name, value in terms.named().items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, reference[name], rtol=1e-6, atol=1e-6, msg=name)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients(half, terms.total))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
@pytest.mark.parametrize("kind", DEPTH_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_stands_at_invalid_pixels_does_not_matter(preset: losses.Preset, kind: DepthKind, garbage: float) -> None:
    invalid, params = ~VALID, LossParams(preset)
    clean = leaves()
    spoilt = clean._replace(
        depth=clean.depth.detach().masked_fill(invalid, garbage).requires_grad_(),
        points=clean.points.detach().masked_fill(invalid[:, :, None], garbage).requires_grad_(),
        confidence=clean.confidence.detach().masked_fill(invalid, garbage).requires_grad_(),
    )
    spoilt_batch = replace(
        labelled(kind),
        depth=DEPTH.masked_fill(invalid, garbage),
        points=POINTS.masked_fill(invalid[:, :, None], garbage),
    )
    terms = losses_of(Prediction(*clean), labelled(kind), params)
    spoilt_terms = losses_of(Prediction(*spoilt), spoilt_batch, params)
    assert spoilt_terms.named() == terms.named()
    expected, found = gradients(clean, terms.total), gradients(spoilt, spoilt_terms.total)
    for name in Leaves._fields:
        assert getattr(expected, name).isfinite().all(), name
        assert torch.equal(getattr(expected, name), getattr(found, name)), name


@pytest.mark.parametrize("kind", DEPTH_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_sample_without_valid_pixels_neither_dilutes_nor_breaks(preset: losses.Preset, kind: DepthKind) -> None:
    parts, batch, params = leaves(), labelled(kind), LossParams(preset)
    blind = VALID.clone()
    blind[1] = False
    terms = losses_of(Prediction(*parts), replace(batch, valid=blind), params)
    seeing = per_sample(Prediction(*parts), batch, params)
    assert terms.depth == seeing["depth"].value[0]
    assert terms.point == seeing["point"].value[0]
    gradient = gradients(parts, terms.total)
    for part in (gradient.depth, gradient.points, gradient.confidence):
        assert part.isfinite().all()
        assert part[0].abs().max() > 0
        assert part[1].abs().max() == 0


@pytest.mark.parametrize("kind", DEPTH_KINDS)
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_valid_at_all(preset: losses.Preset, kind: DepthKind) -> None:
    parts, batch = leaves(), replace(labelled(kind), valid=torch.zeros_like(VALID))
    terms = losses_of(Prediction(*parts), batch, LossParams(preset))
    assert terms.depth is not None
    assert terms.point is not None
    assert terms.depth == terms.point == 0
    # Every rank runs backward, so the zeros must be attached to the graph: grad would raise here.
    by_depth = torch.autograd.grad(terms.depth, [parts.depth], retain_graph=True)
    by_point = torch.autograd.grad(terms.point, [parts.points, parts.confidence])
    for gradient in by_depth + by_point:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_frame_without_valid_pixels_does_not_dilute(preset: losses.Preset) -> None:
    parts, params = leaves(), LossParams(preset)
    blind = VALID.clone()
    blind[:, -1] = False
    with_blind = per_sample(Prediction(*parts), replace(labelled(), valid=blind), params)
    shorter = replace(labelled(), depth=DEPTH[:, :-1], points=POINTS[:, :-1], valid=VALID[:, :-1])
    cut = parts._replace(depth=parts.depth[:, :-1], points=parts.points[:, :-1], confidence=parts.confidence[:, :-1])
    without = per_sample(Prediction(*cut), shorter, params)
    torch.testing.assert_close(with_blind["depth"].value, without["depth"].value)
    torch.testing.assert_close(with_blind["point"].value, without["point"].value)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_batch_is_the_mean_of_its_samples(preset: losses.Preset) -> None:
    parts, params = leaves(), LossParams(preset, chamfer_points=50)
    few = VALID.clone()
    few[0, 1:] = False  # one sample has far fewer valid pixels; its mean counts as much
    batch = replace(labelled(), valid=few, depth_kind=("metric", "affine_depth"))
    together = per_sample(Prediction(*parts), batch, params)
    terms = losses_of(Prediction(*parts), batch, params)
    assert set(together) == {"diffusion", "depth", "point", "camera"}
    for name, term in together.items():
        assert term.value.shape == term.counted.shape == (B,)
        assert term.value.dtype == torch.float32
        assert getattr(terms, name) == term.value.mean(), name
    for i in range(B):
        one = slice(i, i + 1)
        single = replace(
            batch,
            latents=batch.latents[one],
            pose9=POSE[one],
            depth=DEPTH[one],
            points=POINTS[one],
            valid=few[one],
            depth_kind=batch.depth_kind[one],
            position=torch.tensor([(3, 7)[i]]),
        )
        for name, term in per_sample(Prediction(*(x[one] for x in parts)), single, params).items():
            torch.testing.assert_close(term.value[0], together[name].value[i], msg=name)


def test_diffusion_is_the_plain_mean_square() -> None:
    velocity = torch.tensor([[1.0, 2.0], [0.0, 4.0]]).reshape(2, 1, 1, 1, 2)
    target = torch.tensor([[0.0, 2.0], [0.0, 1.0]]).reshape(2, 1, 1, 1, 2)
    samples = losses.sample_losses(Prediction(velocity, None, None, None, None), labelled(), target, GUIDE)
    assert samples.diffusion is not None
    assert samples.diffusion.value.tolist() == [0.5, 4.5]
    assert samples.diffusion.mean() == 2.5


# ---- depth ----


def test_guide_depth_of_one_pixel_by_hand() -> None:
    ssim = (2 * 2 * 1 + C1) / (4 + 1 + C1)  # no variance: the second factor is C2 / C2
    assert depth_loss(torch.full((1, 1, 1), 2.0), torch.ones(1, 1, 1), params=GUIDE) == pytest.approx(1 + 1 - ssim)


def test_guide_depth_of_two_pixels_by_hand() -> None:
    # One window holds both: means 2 and 1.5, variances 1 and 0.25, covariance 0.5.
    prediction, label = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[1.0, 2.0]]])
    ssim = (2 * 2 * 1.5 + C1) / (4 + 2.25 + C1) * (2 * 0.5 + C2) / (1 + 0.25 + C2)
    assert depth_loss(prediction, label, params=GUIDE) == pytest.approx(0.5 + 1 - ssim)
    # With the second one invalid nothing of it is left, and the first one is perfect.
    assert depth_loss(prediction, label, params=GUIDE, valid=torch.tensor([[[True, False]]])) == 0


def test_ssim_against_a_slow_reference() -> None:
    x, y, valid = uniform(10, 11, 13, seed=1), uniform(10, 11, 13, seed=2), uniform(10, 11, 13, seed=3) > 0.3
    valid[0, :8, :8] = False  # windows without any valid pixel
    shortfalls = []
    for t, i, j in np.argwhere(valid.numpy()):
        window = (t, slice(max(i - 3, 0), i + 4), slice(max(j - 3, 0), j + 4))
        inside = valid[window].numpy()
        a, b = x[window].numpy()[inside].astype(float), y[window].numpy()[inside].astype(float)
        covariance = (a * b).mean() - a.mean() * b.mean()
        luminance = (2 * a.mean() * b.mean() + C1) / (a.mean() ** 2 + b.mean() ** 2 + C1)
        shortfalls.append(1 - luminance * (2 * covariance + C2) / (a.var() + b.var() + C2))
    assert losses.dissimilarity(x, y, valid).item() == pytest.approx(np.mean(shortfalls), rel=1e-5)


def test_ssim_of_a_far_and_flat_surface_is_not_rounding_noise() -> None:
    label = 1000 + 0.001 * uniform(1, 20, 20)
    flat = torch.full_like(label, 1000.0)
    everywhere = torch.ones_like(label, dtype=torch.bool)
    assert losses.dissimilarity(flat, label, everywhere).item() == pytest.approx(0, abs=1e-3)


def test_paper_depth_by_hand() -> None:
    prediction = torch.tensor([[[1.0, 1.0]], [[3.0, 1.0]], [[3.0, 9.0]]])
    label = torch.tensor([[[1.0, 2.0]], [[2.0, 2.0]], [[2.0, 5.0]]])
    valid = torch.tensor([[[True, True]], [[True, True]], [[True, False]]])
    # L1: 0, 1, 1, 1, 1 over five pixels. Change: 2 against 1, 0 against 0, 0 against 0; the last pair is not complete.
    assert depth_loss(prediction, label, valid=valid) == pytest.approx(4 / 5 + 1 / 3)


def test_paper_depth_of_a_single_frame_is_l1() -> None:
    assert depth_loss(torch.full((1, 1, 2), 2.0), torch.ones(1, 1, 2)) == 1


@pytest.mark.parametrize("params", [GUIDE, PAPER])
def test_labels_are_never_interpolated_in_time(params: LossParams) -> None:
    label = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0])[:, None, None].expand(5, 4, 4).clone()
    valid = torch.ones_like(label, dtype=torch.bool)
    smooth = torch.full_like(label, 2.0)  # what halving and doubling the label's frames would leave
    assert depth_loss(label.clone(), label, params=params) == 0
    assert depth_loss(smooth, label, params=params) >= 1

    # A missing frame is not filled in from its neighbours: whatever is predicted there is right.
    valid[1] = False
    prediction = label.clone()
    for value in (1.0, 2.0, 100.0):
        prediction[1] = value
        assert depth_loss(prediction, label, params=params, valid=valid) == 0

    with pytest.raises(ValueError, match=r"batch.depth \(2, 5, 9, 12\) and prediction \(2, 2, 9, 12\) differ.*never"):
        losses_of(Prediction(None, DEPTH[:, ::4], None, None, None), labelled(), diffusion_in_total=False)


# ---- depth of unknown scale and shift ----


def matching_label(prediction: Tensor, kind: DepthKind) -> Tensor:
    return 1 / prediction if kind == "affine_disparity" else prediction


AFFINE: list[DepthKind] = ["affine_depth", "affine_disparity"]
affine = pytest.mark.parametrize("kind", AFFINE)
presets = pytest.mark.parametrize("params", [GUIDE, PAPER])


@affine
@presets
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (1000, 0), (1e-3, 5), (4, -50)])
def test_an_affine_match_is_perfect(kind: DepthKind, params: LossParams, scale: float, shift: float) -> None:
    prediction = 0.5 + uniform(T, H, W)
    label = scale * matching_label(prediction, kind) + shift
    assert depth_loss(prediction, label, kind, params) == pytest.approx(0, abs=2e-3 if scale < 1 else 1e-4)
    assert depth_loss(prediction, label, "metric", params) > 0 or (scale, shift) == (1, 0)


def test_depth_and_disparity_are_not_the_same() -> None:
    prediction = 0.5 + uniform(T, H, W)
    assert depth_loss(prediction, 1 / prediction, "affine_depth") > 1
    assert depth_loss(prediction, prediction, "affine_disparity") > 1


@affine
@presets
def test_scale_and_shift_of_an_affine_label_do_not_matter(kind: DepthKind, params: LossParams) -> None:
    prediction, label = 0.5 + uniform(T, H, W), uniform(T, H, W, seed=1)
    assert depth_loss(prediction, 300 * label - 20, kind, params) == pytest.approx(
        depth_loss(prediction, label, kind, params), rel=1e-4
    )


@affine
@presets
def test_flat_and_inverted_predictions_do_not_pay(kind: DepthKind, params: LossParams) -> None:
    label = uniform(T, H, W)
    right = matching_label(1 + label, kind)
    noisy = matching_label(1 + label + 0.1 * uniform(T, H, W, seed=1), kind)
    inverted = matching_label(2 - label, kind)
    shrinking = [depth_loss(1 + spread * (right - 1), label, "affine_depth", params) for spread in (1, 0.1, 0.01)]
    flat = depth_loss(torch.ones_like(label), label, kind, params)
    assert depth_loss(right, label, kind, params) == pytest.approx(0, abs=1e-4)
    assert 0 < depth_loss(noisy, label, kind, params) < 0.5 * flat
    assert flat > 0.5
    assert depth_loss(inverted, label, kind, params) > 1.2 * flat
    if kind == "affine_depth":
        assert shrinking == pytest.approx([0, 0, 0], abs=1e-3), "only the shape of a prediction counts, not its spread"


def test_affine_alignment_is_per_clip_and_by_hand() -> None:
    # Over both frames the prediction is -1, 1, 1, -1 and the label -1, 1, -1, 1 deviations of 1/3 from its mean.
    prediction, label = torch.tensor([[[1.0, 3.0]], [[3.0, 1.0]]]), torch.tensor([[[10.0, 30.0]], [[10.0, 30.0]]])
    assert depth_loss(prediction, label, "affine_depth") == pytest.approx(((0 + 0 + 2 + 2) / 4 + (2 + 2) / 2) / 3)
    # Each frame by itself would be a perfect match here.
    drifting = torch.tensor([[[1.0, 3.0]], [[3.0, 5.0]]])
    assert depth_loss(drifting, label, "affine_depth") > 0.2


@affine
@presets
def test_an_inverted_prediction_finds_its_way(kind: DepthKind, params: LossParams) -> None:
    label = uniform(1, 6, 6)
    log_depth = (0.3 * (matching_label(1.5 - label, kind) - 1)).requires_grad_()
    optimiser = torch.optim.Adam([log_depth], lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        valid = torch.ones_like(label, dtype=torch.bool)
        loss = losses.depth_term(log_depth.exp(), label, valid, kind, params).value
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


@affine
@presets
@pytest.mark.parametrize("case", ["flat label", "two pixels", "flat prediction", "tiny prediction", "zero prediction"])
def test_degenerate_fits_are_finite(kind: DepthKind, params: LossParams, case: str) -> None:
    prediction, label, valid = 0.5 + uniform(1, H, W), uniform(1, H, W, seed=1), torch.ones(1, H, W, dtype=torch.bool)
    if case == "flat label":
        label = torch.full_like(label, 0.1)
    if case == "two pixels":
        valid = torch.arange(H * W).reshape(1, H, W) < 2
    if case == "flat prediction":
        prediction = torch.ones_like(prediction)
    if case == "tiny prediction":
        prediction = 1e-20 * prediction
    if case == "zero prediction":
        prediction = torch.zeros_like(prediction)
    prediction.requires_grad_()
    term = losses.depth_term(prediction, label, valid, kind, params)
    (gradient,) = torch.autograd.grad(term.value, [prediction])
    assert gradient.isfinite().all()
    says_nothing = case in ("flat label", "two pixels")
    assert term.counted.item() is not says_nothing
    if says_nothing:
        assert term.value == 0
        assert gradient.abs().max() == 0
    else:
        assert 0.2 < term.value < 2


def test_three_valid_pixels_are_enough() -> None:
    valid = torch.arange(H * W).reshape(1, H, W) < 3
    assert losses.depth_term(uniform(1, H, W), uniform(1, H, W, seed=1), valid, "affine_depth", PAPER).counted


# ---- points ----


def cloud(*points: tuple[float, float, float]) -> Tensor:
    return torch.tensor(points, dtype=torch.float32)


def test_chamfer_by_hand() -> None:
    label = cloud((0, 0, 0), (10, 0, 0))
    prediction = cloud((0, 3, 4), (6, 0, 0))
    # To the label 5 and 4; to the prediction 5 and 4. The nearest, not the one of the same pixel:
    for order in ([0, 1], [1, 0]):
        assert losses.chamfer(prediction[order], torch.ones(2), label, 0.1) == 9
    # Confidence 1 and 3: weights 0.5 and 1.5 on the way to the label.
    expected = (0.5 * 5 + 1.5 * 4) / 2 + 4.5 - 0.1 * (math.log(0.5) + math.log(1.5)) / 2
    assert losses.chamfer(prediction, torch.tensor([1.0, 3.0]), label, 0.1).item() == pytest.approx(expected)


def test_both_ways_count() -> None:
    # All on one label: perfect on the way there, the other label is unexplained on the way back.
    collapsed = losses.chamfer(torch.zeros(2, 3), torch.ones(2), cloud((0, 0, 0), (1, 0, 0)), 0.1)
    spread = losses.chamfer(cloud((0, 0, 0), (1, 0, 0)), torch.ones(2), torch.zeros(2, 3), 0.1)
    assert collapsed == spread == 0.5


def test_nearest_over_chunks_and_far_from_the_origin() -> None:
    far = torch.tensor([1000.0, 2000.0, 3000.0])
    queries, points = 4 * uniform(1500, 3) + far, 4 * uniform(1100, 3, seed=1) + far
    squares = (queries.double()[:, None] - points.double()[None]).square().sum(-1)
    of_queries, of_points = losses.nearest(queries, points)
    assert torch.equal(of_queries, squares.argmin(1))
    assert torch.equal(of_points, squares.argmin(0))


def test_only_the_ratio_of_confidences_counts() -> None:
    prediction, label, confidence = noise(20, 3), noise(20, 3, seed=1), 1 + uniform(20)
    once = losses.chamfer(prediction, confidence, label, 0.1).item()
    assert losses.chamfer(prediction, 10 * confidence, label, 0.1).item() == pytest.approx(once)


def test_confidence_does_not_collapse() -> None:
    label = torch.arange(20.0)[:, None] * cloud((10, 0, 0))
    distance = torch.linspace(0, 2, 20)
    prediction = label + distance[:, None] * cloud((0, 1, 0))
    logits = torch.zeros(20, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1500):
        optimiser.zero_grad()
        loss = losses.chamfer(prediction, logits.exp(), label, 0.1)
        loss.backward()
        optimiser.step()
    weight = (logits.exp() / logits.exp().mean()).detach()
    # Stationary where weight * (distance + constant) = alpha.
    constant = 0.1 / weight - distance
    torch.testing.assert_close(constant, constant.mean().expand(20), atol=5e-3, rtol=0)
    assert constant.mean() > 0
    assert weight.min() > 0.03
    assert (weight.diff() < 0).all()
    assert 0 < loss.item() < 2


def test_samples_are_a_function_of_mask_and_position() -> None:
    valid = uniform(T, H, W) > 0.25
    pixels = losses.sample_pixels(valid, 50, position=3)
    torch.manual_seed(1)
    assert torch.equal(pixels, losses.sample_pixels(valid, 50, position=3))
    assert not torch.equal(pixels, losses.sample_pixels(valid, 50, position=4))
    assert valid.flatten()[pixels].all()
    assert len(pixels) == 50
    assert pixels.unique().numel() == 50
    # Every frame gets its share.
    shares = (pixels // (H * W)).bincount(minlength=T) / 50
    torch.testing.assert_close(shares, valid.sum((1, 2)) / valid.sum(), atol=0.04, rtol=0)
    # In the end every valid pixel has its turn.
    drawn = torch.cat([losses.sample_pixels(valid, 50, position=k) for k in range(400)])
    assert torch.equal(drawn.unique(), valid.flatten().nonzero().squeeze(1))


def test_few_valid_pixels_are_all_taken() -> None:
    valid = torch.zeros(T, H, W, dtype=torch.bool)
    valid[1, 2, 3] = valid[4, 8, 11] = True
    assert losses.sample_pixels(valid, 50, position=0).tolist() == [(H + 2) * W + 3, (4 * H + 8) * W + 11]


def test_guide_points_are_the_chamfer_distance_of_the_sampled_pixels() -> None:
    parts, params = leaves(), LossParams(chamfer_points=40)
    found = per_sample(Prediction(*parts), labelled(), params)["point"].value
    for i, position in enumerate((3, 7)):
        chosen = torch.zeros(T * H * W, dtype=torch.bool)
        chosen[losses.sample_pixels(VALID[i], 40, position)] = True
        mask = chosen.reshape(T, H, W)
        prediction, label = parts.points[i].movedim(1, -1)[mask], POINTS[i].movedim(1, -1)[mask]
        distance = (prediction[:, None] - label[None]).norm(dim=-1)
        weight = parts.confidence[i][mask] / parts.confidence[i][mask].mean()
        expected = (weight * distance.amin(1)).mean() + distance.amin(0).mean() - 0.1 * weight.log().mean()
        torch.testing.assert_close(found[i], expected)


def test_paper_points_by_hand() -> None:
    label = torch.zeros(1, 3, 2, 2)
    prediction = label.clone()
    prediction[0, :, 0, 0] = torch.tensor([3.0, -6.0, 0.0])  # mean absolute error 3
    prediction[0, :, 1, 1] = 100.0
    confidence = torch.tensor([[[2.0, 1.0], [4.0, 50.0]]])
    valid = torch.tensor([[[True, True], [True, False]]])
    # L1: 2 * 3 over three pixels. Gradient: one complete pair each way, both 3.
    expected = 6 / 3 + 3 + 3 - 0.1 * (math.log(2) + math.log(1) + math.log(4)) / 3
    term = losses.point_term(prediction, confidence, label, valid, 0, PAPER)
    assert term.value.item() == pytest.approx(expected)


def test_paper_confidence_settles_at_alpha_over_error() -> None:
    confidence = torch.full((1, 1, 1), 2.0, requires_grad=True)
    label = torch.zeros(1, 3, 1, 1)
    everywhere = torch.ones(1, 1, 1, dtype=torch.bool)
    term = losses.point_term(label + 0.05, confidence, label, everywhere, 0, PAPER)
    (gradient,) = torch.autograd.grad(term.value, [confidence])
    assert gradient.item() == pytest.approx(0, abs=1e-7)  # 0.05 - 0.1 / 2


# ---- cameras ----


def camera_loss(prediction: Tensor, label: Tensor, params: LossParams) -> list[float]:
    return losses.camera_term(prediction, label, params).tolist()


def test_cameras_by_hand() -> None:
    label = torch.zeros(2, 1, 9)
    prediction = label.clone()
    prediction[0, 0, 0] = 3.0
    prediction[1, 0, 8] = 0.05
    assert camera_loss(prediction, label, GUIDE) == pytest.approx([9 / 9, 0.05**2 / 9])
    assert camera_loss(prediction, label, PAPER) == pytest.approx([0.1 * (3 - 0.05) / 9, 0.05**2 / 2 / 9])
    assert camera_loss(prediction, label, LossParams("paper", huber_delta=5)) == pytest.approx([4.5 / 9, 0.00125 / 9])


@presets
def test_roll_goes_the_short_way_round_and_nothing_else_does(params: LossParams) -> None:
    label, prediction = torch.zeros(1, 1, 9), torch.zeros(1, 1, 9)
    label[..., 7], prediction[..., 7] = math.pi - 0.01, -math.pi + 0.01
    small = torch.zeros(1, 1, 9)
    small[..., 7] = 0.02
    expected = camera_loss(small, torch.zeros(1, 1, 9), params)
    assert camera_loss(prediction, label, params) == pytest.approx(expected, rel=1e-3)
    prediction.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.camera_term(prediction, label, params).sum(), [prediction])
    assert gradient[0, 0, 7] > 0, "descent must turn the roll further down, through -pi"
    for number in (6, 8):  # s and the field of view are no angles on a circle
        turned = torch.zeros(1, 1, 9)
        turned[..., number] = 2 * math.pi
        assert camera_loss(turned, torch.zeros(1, 1, 9), params)[0] > 0.05


# ---- errors ----


def test_missing_inputs_are_named() -> None:
    incomplete = {
        "batch.depth": replace(labelled(), depth=None),
        "batch.points": replace(labelled(), points=None),
        "batch.valid": replace(labelled(), valid=None),
        "batch.pose9": replace(labelled(), pose9=None),
    }
    for name, batch in incomplete.items():
        with pytest.raises(ValueError, match=f"{name} is missing: there is nothing to compare the prediction"):
            losses_of(predicted(), batch)
    with pytest.raises(ValueError, match=r"prediction\.confidence is missing"):
        losses_of(predicted()._replace(confidence=None), labelled())
    with pytest.raises(ValueError, match="velocity_target is missing"):
        losses.compute_losses(predicted(), labelled(), None, GUIDE, diffusion_in_total=True)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"batch\.valid must be bool, got torch\.float32"):
        losses_of(predicted(), replace(labelled(), valid=VALID.float()))
    with pytest.raises(ValueError, match="for 2 samples; give each one of metric, affine_depth, affine_disparity"):
        losses_of(predicted(), replace(labelled(), depth_kind=("metric",)))
    with pytest.raises(ValueError, match="not asked for a velocity"):
        losses_of(predicted()._replace(velocity=None), labelled(), diffusion_in_total=True)
    with pytest.raises(ValueError, match="nothing to train on"):
        losses_of(Prediction(leaves().velocity, None, None, None, None), labelled(), diffusion_in_total=False)


def test_params_are_checked() -> None:
    with pytest.raises(ValueError, match="loss preset 'papers' is unknown; use guide or paper"):
        LossParams("papers")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="point_weight must be finite and not negative, got -1"):
        LossParams(point_weight=-1)
    with pytest.raises(ValueError, match=r"chamfer_points and huber_delta must be positive, got 0 and 0\.1"):
        LossParams(chamfer_points=0)


def test_an_absent_depth_kind_is_metric() -> None:
    assert losses_of(predicted(), replace(labelled(), depth_kind=())).depth == losses_of(predicted(), labelled()).depth


@pytest.mark.parametrize(
    ("preset", "golden"),
    [
        ("guide", [0.9598694, 1.268875, 1.04986, 1.237779, 4.516383]),
        ("paper", [0.9598694, 0.7736617, 4.855462, 0.07877188, 6.825309]),
    ],
)
def test_golden_values(preset: losses.Preset, golden: list[float]) -> None:
    named = losses_of(predicted(), labelled(), LossParams(preset, chamfer_points=100)).named()
    assert [value.item() for value in named.values()] == pytest.approx(golden, rel=1e-5)
