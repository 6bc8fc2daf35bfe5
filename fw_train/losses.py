"""The training objective: diffusion + w_d depth + w_p point + w_c camera.

Axes: B samples, T pixel frames, H x W pixels. Units: scene scales and radians.

Everything is fp32 whatever comes in. Labels are compared where `batch.valid` says so and exactly as they are: never
resampled, in time least of all. What stands at invalid pixels, NaN included, influences neither loss nor gradient.
A term is a mean over the valid pixels of a sample (all its frames together), then over the samples that have any;
a sample without valid pixels counts for nothing and gets zero gradients.

Two presets. `guide`: depth L1 + SSIM, points Chamfer, camera mean square, weights 1. `paper`: depth L1 + temporal
gradient, points confidence-weighted L1 + spatial gradient, camera Huber, weights 1, 1, 3.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fw_train.batch import DEPTH_KINDS, Batch, DepthKind, Prediction
from fw_train.geometry import wrap_angle

Preset = Literal["guide", "paper"]

ROLL = 7  # index of the only periodic one of the 9 camera numbers
SSIM_WINDOW_PX = 7
SSIM_LUMINANCE, SSIM_CONTRAST = 0.01**2, 0.03**2  # the usual constants for a dynamic range of 1, here one scene scale
SSIM_CHUNK_FRAMES = 8
NEAREST_CHUNK_POINTS = 1024
MIN_DEPTH = 1e-3  # scene scales; keeps 1 / depth finite
MIN_SPREAD = 1e-3  # scene scales; a prediction that varies less than this is flat
ALIGNED_MEAN, ALIGNED_SPREAD = 1.0, 1 / 3  # of depth whose scale and shift are unknown: about those of a metric clip


class Weights(NamedTuple):
    depth: float
    point: float
    camera: float


def preset_weights(preset: Preset) -> Weights:
    """The weights that a preset comes with."""
    return Weights(1.0, 1.0, 3.0) if preset == "paper" else Weights(1.0, 1.0, 1.0)


@dataclass(frozen=True)
class LossParams:
    """What may be chosen about the objective; a weight that is None is the preset's."""

    preset: Preset = "guide"
    depth_weight: float | None = None
    point_weight: float | None = None
    camera_weight: float | None = None
    # Points per clip in the Chamfer distance. 4096 lie about 0.05 scene scales apart on ten square scene scales of
    # surface, a tenth of the distance at which the term counts as good; the work, 17 M distances each way, grows with
    # the square.
    chamfer_points: int = 4096
    confidence_alpha: float = 0.1  # pull of the confidence term
    huber_delta: float = 0.1  # scene scales and radians (6 degrees) where the camera error turns from square to linear

    def __post_init__(self) -> None:
        if self.preset not in get_args(Preset):
            raise ValueError(f"loss preset {self.preset!r} is unknown; use {' or '.join(get_args(Preset))}")
        for name in ("depth_weight", "point_weight", "camera_weight", "confidence_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if self.chamfer_points < 1 or not self.huber_delta > 0:
            raise ValueError(
                f"chamfer_points and huber_delta must be positive, got {self.chamfer_points} and {self.huber_delta}"
            )

    @property
    def weights(self) -> Weights:
        default = preset_weights(self.preset)
        return Weights(
            depth=default.depth if self.depth_weight is None else self.depth_weight,
            point=default.point if self.point_weight is None else self.point_weight,
            camera=default.camera if self.camera_weight is None else self.camera_weight,
        )


class PerSample(NamedTuple):
    """One unweighted term of each sample; a single sample's has no axes."""

    value: Tensor  # fp32 [B], 0 where not counted
    counted: Tensor  # bool [B], the sample has something to compare

    def mean(self) -> Tensor:
        """Mean over the counted samples; 0, still attached to the graph, if there are none."""
        return _masked_mean(self.value, self.counted)


class SampleLosses(NamedTuple):
    """The terms of every sample by itself; None for what the network did not return."""

    diffusion: PerSample | None
    depth: PerSample | None
    point: PerSample | None
    camera: PerSample | None


class LossTerms(NamedTuple):
    """The unweighted terms of a batch, scalars, and the weighted sum of those that carry a gradient."""

    diffusion: Tensor | None
    depth: Tensor | None
    point: Tensor | None
    camera: Tensor | None
    total: Tensor

    def named(self) -> dict[str, Tensor]:
        """Detached values under the names of the log; absent terms are left out."""
        values = {
            "loss/diffusion": self.diffusion,
            "loss/depth_loss": self.depth,
            "loss/point_loss": self.point,
            "loss/camera_loss": self.camera,
            "loss/total": self.total,
        }
        return {name: value.detach() for name, value in values.items() if value is not None}


def compute_losses(
    prediction: Prediction,
    batch: Batch,
    velocity_target: Tensor | None,
    params: LossParams,
    *,
    diffusion_in_total: bool,
) -> LossTerms:
    """The terms of a batch; without `diffusion_in_total` the diffusion loss is for the log alone and is detached."""
    samples = sample_losses(prediction, batch, velocity_target, params)
    diffusion, depth, point, camera = (None if term is None else term.mean() for term in samples)
    geometry = zip(params.weights, (depth, point, camera), strict=True)
    trained = [weight * term for weight, term in geometry if term is not None]
    if diffusion_in_total:
        if diffusion is None:
            raise ValueError("the diffusion loss is to be trained on, but the network was not asked for a velocity")
        trained.append(diffusion)
    elif diffusion is not None:
        diffusion = diffusion.detach()
    if not trained:
        raise ValueError("nothing to train on: no geometry was predicted, and the diffusion loss is for the log alone")
    return LossTerms(diffusion, depth, point, camera, total=torch.stack(trained).sum())


def sample_losses(
    prediction: Prediction, batch: Batch, velocity_target: Tensor | None, params: LossParams
) -> SampleLosses:
    """The terms of every sample by itself: what evaluation judges and `compute_losses` averages."""
    diffusion = depth = point = camera = None
    if prediction.velocity is not None:
        target = _matching("velocity_target", velocity_target, prediction.velocity)
        error = prediction.velocity.float() - target.float()
        diffusion = _all_counted(error.square().flatten(1).mean(1))
    if prediction.depth is not None:
        label = _matching("batch.depth", batch.depth, prediction.depth)
        valid = _validity(batch, prediction.depth)
        kinds = _depth_kinds(batch, len(label))
        clips = zip(prediction.depth, label, valid, kinds, strict=True)
        depth = _stacked([depth_term(p, y, v, kind, params) for p, y, v, kind in clips])
    if prediction.points is not None:
        label = _matching("batch.points", batch.points, prediction.points)
        confidence = _matching("prediction.confidence", prediction.confidence, prediction.points[:, :, 0])
        valid = _validity(batch, confidence)
        places = [0] * len(label) if batch.position is None else batch.position.tolist()
        scored = zip(prediction.points, confidence, label, valid, places, strict=True)
        point = _stacked([point_term(p, c, y, v, place, params) for p, c, y, v, place in scored])
    if prediction.cameras is not None:
        label = _matching("batch.pose9", batch.pose9, prediction.cameras)
        camera = _all_counted(camera_term(prediction.cameras, label, params))
    return SampleLosses(diffusion, depth, point, camera)


def depth_term(prediction: Tensor, label: Tensor, valid: Tensor, kind: DepthKind, params: LossParams) -> PerSample:
    """L1 plus 1 - SSIM (guide) or plus the L1 of the change between frames (paper); one clip [T, H, W]."""
    prediction, label, counted = align(prediction, label, valid, kind)
    residual = prediction - label
    value = _masked_mean(residual.abs(), valid)
    if params.preset == "guide":
        value = value + dissimilarity(prediction, label, valid)
    else:
        value = value + _masked_mean(residual.diff(dim=0).abs(), valid[1:] & valid[:-1])
    return PerSample(torch.where(counted, value, 0), counted)


class Aligned(NamedTuple):
    """Depth in comparable units, one clip; finite everywhere, meaningless at invalid pixels."""

    prediction: Tensor  # fp32 [T, H, W]
    label: Tensor  # fp32 [T, H, W]
    counted: Tensor  # bool, the label says something


def align(prediction: Tensor, label: Tensor, valid: Tensor, kind: DepthKind) -> Aligned:
    """Brings prediction and label [T, H, W] of one clip into the units in which they are compared.

    Metric labels stay as they are. A label of unknown scale and shift is fitted per clip by the symmetric least-squares
    line with positive slope: over the valid pixels of all frames, prediction (its inverse for disparity) and label are
    brought to the same mean and standard deviation. Those resemble a metric clip's, so that both kinds weigh alike and
    SSIM sees the positive images it presumes (with signs, it takes an inverted image for a perfect one).

    Why not regress one on the other: label on prediction is won by a flat prediction; prediction on label is won by an
    inverted one, or, with the slope kept positive, gives that one no gradient. Here the scale and shift of the label
    drop out, a flat prediction is as bad as the label is varied, and an inverted one is worse.

    A label that is constant or has fewer than 3 valid pixels fits everything, so it is not counted.
    """
    # 1 has a finite reciprocal; `where` also keeps the gradient at invalid pixels at 0 whatever stands there.
    prediction = torch.where(valid, prediction.float(), 1)
    label = torch.where(valid, label.float(), 1)
    if kind == "metric":
        return Aligned(prediction, label, valid.any())
    if kind == "affine_disparity":
        prediction = 1 / prediction.clamp_min(MIN_DEPTH)
    prediction = prediction - _masked_mean(prediction, valid)
    # Clamped before the root, whose slope at 0 is infinite.
    deviation = _masked_mean(prediction.square(), valid).clamp_min(MIN_SPREAD**2).sqrt()
    resolution = 1e-6 * torch.where(valid, label, 0).abs().amax()
    label = label - _masked_mean(label, valid)
    label_deviation = _masked_mean(label.square(), valid).sqrt()
    counted = (label_deviation > resolution) & (valid.sum() >= 3)
    return Aligned(
        prediction=ALIGNED_MEAN + ALIGNED_SPREAD * prediction / deviation,
        label=ALIGNED_MEAN + ALIGNED_SPREAD * label / torch.where(counted, label_deviation, 1),
        counted=counted,
    )


def dissimilarity(prediction: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Mean of 1 - SSIM over the valid pixels of one clip [T, H, W], from 0 to 2.

    Window statistics are taken over the valid pixels of each window; at the others both images need only be finite.
    """
    # A few frames at a time, recomputed in backward: the fp64 maps of a whole clip would take gigabytes.
    chunks = zip(*(x.split(SSIM_CHUNK_FRAMES) for x in (prediction, label, valid)), strict=True)
    sums = [checkpoint(_ssim_shortfall, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
    return torch.stack(sums).sum().float() / valid.sum().clamp_min(1)


def _ssim_shortfall(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Sum of 1 - SSIM over the valid pixels of images [T, H, W], fp64."""
    # E[x^2] - E[x]^2 cancels: at depth 100 the rounding of fp32 would reach SSIM_CONTRAST. And a mean needs no matrix
    # product, which TF32 would round to 10 bits.
    x, y, weight = x.double(), y.double(), valid.double()

    maps = (weight, *(weight * image for image in (x, y, x * x, y * y, x * y)))
    share, *sums = _WindowSums.apply(torch.stack(maps))
    share = share.clamp_min(0.5)  # only where no pixel of the window is valid
    mean_x, mean_y, xx, yy, xy = (total / share for total in sums)
    spread = (xx - mean_x * mean_x) + (yy - mean_y * mean_y)
    luminance = (2 * mean_x * mean_y + SSIM_LUMINANCE) / (mean_x * mean_x + mean_y * mean_y + SSIM_LUMINANCE)
    structure = (2 * (xy - mean_x * mean_y) + SSIM_CONTRAST) / (spread + SSIM_CONTRAST)
    return torch.where(valid, 1 - luminance * structure, 0).sum()


class _WindowSums(torch.autograd.Function):
    """Sums of [..., H, W] over the window around each pixel, of what lies inside; symmetric, so its own transpose.

    Rows and columns one after the other, by whole shifted images: pooling reads every window anew, which takes a quarter of a
    step of stage 1 on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        return _window_sums(_window_sums(maps, -1), -2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _window_sums(_window_sums(gradient, -1), -2)


def _window_sums(x: Tensor, axis: int) -> Tensor:
    size, reach = x.shape[axis], SSIM_WINDOW_PX // 2
    sums = x.clone()
    for shift in range(1, min(reach, size - 1) + 1):
        rest = size - shift
        sums.narrow(axis, 0, rest).add_(x.narrow(axis, shift, rest))
        sums.narrow(axis, shift, rest).add_(x.narrow(axis, 0, rest))
    return sums


def point_term(
    prediction: Tensor, confidence: Tensor, label: Tensor, valid: Tensor, position: int, params: LossParams
) -> PerSample:
    """Points [T, 3, H, W] of one clip with their confidence c [T, H, W].

    Guide: the Chamfer distance of the pixels that `position` selects.
    Paper: c |error| + |spatial gradient of the error| - alpha log c, absolute values averaged over x, y, z.
    """
    if params.preset == "guide":
        pixels = sample_pixels(valid, params.chamfer_points, position)
        weighting = confidence.flatten()[pixels].float()
        value = chamfer(_at(prediction, pixels), weighting, _at(label, pixels), params.confidence_alpha)
        return PerSample(value, valid.any())
    residual = torch.where(valid[:, None], prediction.float() - label.float(), 0)
    confidence = torch.where(valid, confidence.float(), 1)
    value = _masked_mean(confidence * residual.abs().mean(1), valid)
    value = value + _masked_mean(residual.diff(dim=-1).abs().mean(1), valid[..., 1:] & valid[..., :-1])
    value = value + _masked_mean(residual.diff(dim=-2).abs().mean(1), valid[..., 1:, :] & valid[..., :-1, :])
    return PerSample(value - params.confidence_alpha * _masked_mean(confidence.log(), valid), valid.any())


def sample_pixels(valid: Tensor, count: int, position: int) -> Tensor:
    """Up to `count` indices into the flattened valid [T, H, W], spread evenly over its valid pixels.

    One at random from each of `count` equal runs of valid pixels; a function of `valid` and `position` alone.
    """
    candidates = valid.flatten().nonzero().squeeze(1)
    if len(candidates) <= count:
        return candidates
    jitter = torch.rand(count, generator=torch.Generator().manual_seed(position), dtype=torch.float64)
    chosen = ((torch.arange(count) + jitter) * (len(candidates) / count)).long().clamp_max(len(candidates) - 1)
    return candidates[chosen.to(candidates.device)]


def chamfer(prediction: Tensor, confidence: Tensor, label: Tensor, alpha: float) -> Tensor:
    """Distance of each set [N, 3] to the nearest points of the other, the way from prediction to label weighted.

    mean(w |p - nearest label|) + mean(|y - nearest prediction|) - alpha mean(log w), with w = c / mean(c) per clip.
    Both sets come from the same pixels, so a perfect prediction gives 0. The last term keeps the weights from
    collapsing on the easiest point: it is 0 for equal weights, positive otherwise, and unbounded as any weight
    vanishes; the best weights are proportional to 1 / (distance + constant). Only ratios of confidence matter, so it
    cannot lower the loss by growing everywhere. The way back is not weighted: no label can be explained away.
    """
    if len(prediction) == 0:
        return prediction.sum() + confidence.sum()  # 0, attached to the graph
    weight = confidence / confidence.mean()
    of_prediction, of_label = nearest(prediction, label)
    to_label = torch.linalg.vector_norm(prediction - label[of_prediction], dim=-1)
    to_prediction = torch.linalg.vector_norm(label - prediction[of_label], dim=-1)
    return (weight * to_label).mean() + to_prediction.mean() - alpha * weight.log().mean()


@torch.no_grad()
def nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each point of a [N, 3] the index of the nearest of b [M, 3], and the other way round, in bounded memory."""
    # Without matrix products: their rounding (TF32's above all) is larger than the distances looked for.
    mode = "donot_use_mm_for_euclid_dist"
    of_a, of_b = [], torch.zeros(len(b), dtype=torch.int64, device=b.device)
    least = torch.full((len(b),), math.inf, dtype=b.dtype, device=b.device)
    for start in range(0, len(a), NEAREST_CHUNK_POINTS):
        distance = torch.cdist(a[start : start + NEAREST_CHUNK_POINTS], b, compute_mode=mode)
        of_a.append(distance.argmin(1))
        closest, index = distance.min(0)
        of_b = torch.where(closest < least, index + start, of_b)
        least = torch.minimum(least, closest)
    return torch.cat(of_a), of_b


def camera_term(prediction: Tensor, label: Tensor, params: LossParams) -> Tensor:
    """Mean square (guide) or Huber (paper) error [B] of camera numbers [B, T, 9], roll taken the short way round."""
    error = prediction.float() - label.float()
    error = torch.cat([error[..., :ROLL], wrap_angle(error[..., ROLL : ROLL + 1]), error[..., ROLL + 1 :]], dim=-1)
    if params.preset == "guide":
        return error.square().flatten(1).mean(1)
    huber = functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=params.huber_delta)
    return huber.flatten(1).mean(1)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where the mask is set, 0 if it is nowhere; gradients need `values` to be finite everywhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


def _at(points: Tensor, pixels: Tensor) -> Tensor:
    """Points [T, 3, H, W] at indices into the flattened [T, H, W]: fp32 [N, 3]."""
    per_frame = points.shape[-2] * points.shape[-1]
    return points.flatten(2)[pixels // per_frame, :, pixels % per_frame].float()


def _all_counted(value: Tensor) -> PerSample:
    return PerSample(value, torch.ones_like(value, dtype=torch.bool))


def _stacked(clips: list[PerSample]) -> PerSample:
    return PerSample(torch.stack([c.value for c in clips]), torch.stack([c.counted for c in clips]))


def _matching(name: str, value: Tensor | None, prediction: Tensor) -> Tensor:
    if value is None:
        raise ValueError(
            f"{name} is missing: there is nothing to compare the prediction {tuple(prediction.shape)} with"
        )
    if value.shape != prediction.shape:
        raise ValueError(
            f"{name} {tuple(value.shape)} and prediction {tuple(prediction.shape)} differ; "
            "resample the prediction, labels are never resampled"
        )
    return value


def _validity(batch: Batch, prediction: Tensor) -> Tensor:
    valid = _matching("batch.valid", batch.valid, prediction)
    if valid.dtype != torch.bool:
        raise ValueError(f"batch.valid must be bool, got {valid.dtype}")
    return valid


def _depth_kinds(batch: Batch, samples: int) -> tuple[DepthKind, ...]:
    default: DepthKind = "metric"
    kinds = batch.depth_kind or (default,) * samples
    if len(kinds) != samples or not set(kinds) <= set(DEPTH_KINDS):
        raise ValueError(f"depth_kind {kinds} for {samples} samples; give each one of {', '.join(DEPTH_KINDS)}")
    return kinds
