"""Model FLOPs of one sample, derived by hand: what the mathematics needs, whatever a kernel recomputes.

A multiply-add counts two. The backward pass of a product costs one more product for the gradient of its weights (if they
train) and one for the gradient of its input (if anything before it trains); attention's costs twice its forward pass.
Axes: N video tokens, P tokens of a frame, F latent frames, T pixel frames, L text tokens, D width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fw_train.batch import LATENT_CHANNELS, latent_frames
from fw_train.devices import peak_flops as peak_flops
from fw_train.model.camera import POSE
from fw_train.model.heads import DenseHeadParams
from fw_train.model.wan import PATCH, WanParams
from fw_train.model.world import WorldParams

Flow = Literal[
    "forward", "input", "both"
]  # a part that nothing trains through, one that is frozen on the way, one that trains


class Shape(NamedTuple):
    """What a sample brings to the network."""

    frames: int
    height_px: int
    width_px: int
    text_tokens: int = 512
    clip_tokens: int = 257

    @property
    def grid(self) -> tuple[int, int, int]:
        return latent_frames(self.frames), self.height_px // 16, self.width_px // 16


@dataclass
class Cost:
    """Forward FLOPs of a part, by what their backward pass costs."""

    linear: float = 0.0  # products of weights with an input that carries a gradient
    leaf: float = 0.0  # products of weights with an input that carries none
    attention: float = 0.0
    context_attention: float = 0.0  # queries carry a gradient; keys and values only if their weights or the context do

    @property
    def forward(self) -> float:
        return self.linear + self.leaf + self.attention + self.context_attention

    def backward(self, flow: Flow) -> float:
        if flow == "forward":
            return 0.0
        if flow == "input":
            return self.linear + 2 * self.attention + self.context_attention
        return 2 * self.linear + self.leaf + 2 * self.attention + 2 * self.context_attention


class PartFlops(NamedTuple):
    name: str
    forward: float
    backward: float


def sample_flops(params: WorldParams, shape: Shape, stage: str, velocity: bool = True) -> list[PartFlops]:
    """Forward and backward FLOPs of each part of the network for one sample of a training step.

    In stage 1 `velocity` is the rare step on which the diffusion loss is logged: the second half runs forward only.
    """
    wan, (frames, height, width) = params.wan, shape.grid
    per_frame = height * width
    tokens = frames * per_frame
    stream = tokens + (per_frame if wan.reference_conv else 0)
    special = 1 + params.register_tokens
    trains_video, interacts = stage == "stage0", stage == "stage2"
    context_learns = trains_video

    prefix: Flow = "both" if trains_video else "input" if interacts else "forward"
    suffix_runs = trains_video or interacts or velocity
    blocks = params.split_layer, params.pairs if suffix_runs else 0
    block = _wan_block(wan, stream, shape, context_learns)
    parts = [
        _part("video embeddings", _embeddings(wan, shape), "both" if trains_video else "forward"),
        _part(f"video blocks 0..{params.split_layer - 1}", block, prefix, blocks[0]),
        _part(f"video blocks {params.split_layer}..{wan.layers - 1}", block, prefix, blocks[1]),
    ]
    if trains_video or velocity:
        parts.append(_part("video head", Cost(linear=_linear(tokens, wan.dim, wan.out_dim * PATCH**2)), prefix))
    if trains_video:
        return parts

    dim = wan.dim
    both: Flow = "both"
    geometry = _wan_block(wan, tokens + special, shape, context_learns)
    geometry.linear += 4 * _linear(tokens, dim, dim) + _linear(frames, dim, dim)  # frame attention, pose adapter
    geometry.attention += _attention(tokens, per_frame, dim)
    bridge = Cost(
        linear=4 * _linear(tokens, dim, dim) + 2 * _linear(tokens, dim, 4 * dim),
        attention=_attention(tokens, tokens, dim),
    )
    pose = Cost(leaf=_linear(shape.frames, POSE, dim), linear=_linear(shape.frames, dim, dim))
    parts += [
        _part("pose encoder", pose, both),
        _part("latent bridge", bridge, both, params.bridge_layers),
        _part("geometry blocks", geometry, both, params.pairs),
        _part("depth head", _dense_head(params.head, shape, 1), both),
        _part("point head", _dense_head(params.head, shape, 4), both),
        _part("camera head", _camera_head(dim, frames, shape.frames), both),
    ]
    if interacts:
        cross = params.cross_width
        both_sides = 2 * tokens + special
        irg = Cost(
            linear=3 * _linear(both_sides, dim, cross), attention=2 * _attention(tokens, tokens + special, cross)
        )
        parts.append(_part("camera adapters", Cost(linear=_linear(frames, dim, dim)), both, params.split_layer))
        parts.append(_part("cross-attention", irg, both, params.pairs))
    return parts


def total_flops(parts: list[PartFlops]) -> float:
    return sum(part.forward + part.backward for part in parts)


def _part(name: str, cost: Cost, flow: Flow, times: int = 1) -> PartFlops:
    return PartFlops(name, times * cost.forward, times * cost.backward(flow))


def _linear(rows: int, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def _attention(queries: int, keys: int, width: int) -> float:
    return 4.0 * queries * keys * width


def _wan_block(wan: WanParams, tokens: int, shape: Shape, context_learns: bool) -> Cost:
    dim = wan.dim
    context = shape.text_tokens + (shape.clip_tokens if wan.inputs.clip else 0)
    keys_values = 2 * _linear(context, dim, dim)
    return Cost(
        # q, k, v, o of self-attention; q, o of cross-attention; the feed-forward
        linear=6 * _linear(tokens, dim, dim) + 2 * _linear(tokens, dim, wan.ffn_dim) + keys_values * context_learns,
        leaf=keys_values * (not context_learns),
        attention=_attention(tokens, tokens, dim),
        context_attention=_attention(tokens, context, dim),
    )


def _embeddings(wan: WanParams, shape: Shape) -> Cost:
    frames, height, width = shape.grid
    per_frame, dim, inputs = height * width, wan.dim, wan.inputs
    tokens = frames * per_frame
    cost = Cost(
        leaf=_linear(tokens, inputs.in_channels * PATCH**2, dim)
        + _linear(shape.text_tokens, wan.text_dim, dim)
        + _linear(1, wan.freq_dim, dim),
        linear=_linear(shape.text_tokens, dim, dim) + 7 * _linear(1, dim, dim),
    )
    if inputs.clip:
        cost.linear += _linear(shape.clip_tokens, wan.clip_dim, wan.clip_dim) + _linear(
            shape.clip_tokens, wan.clip_dim, dim
        )
    if inputs.camera_channels:
        cost.leaf += _linear(tokens, inputs.camera_channels * 64 * PATCH**2, dim)
        cost.linear += 2 * _linear(tokens, 9 * dim, dim)
    if wan.reference_conv:
        cost.leaf += _linear(per_frame, LATENT_CHANNELS * PATCH**2, dim)
    return cost


def _dense_head(head: DenseHeadParams, shape: Shape, outputs: int) -> Cost:
    frames, h, w = shape.grid
    f, neck = head.features, head.features // 2
    sizes = [(4 * h, 4 * w), (2 * h, 2 * w), (h, w), ((h + 1) // 2, (w + 1) // 2)]
    pixels = [a * b for a, b in sizes]
    per_frame = 0.0
    for index, (channels, level) in enumerate(zip(head.channels, pixels, strict=True)):
        per_frame += _linear(h * w, head.dim, channels)
        per_frame += _linear(level, 9 * channels, f)
        units = 2 if index == len(pixels) - 1 else 4  # 3x3 convolutions; nothing joins the coarsest level
        per_frame += units * _linear(level, 9 * f, f) + _linear(level, f, f)
    # transposed convolutions of the two finest taps, the strided one of the coarsest
    per_frame += _linear(h * w, head.channels[0], 16 * head.channels[0])
    per_frame += _linear(h * w, head.channels[1], 4 * head.channels[1])
    per_frame += _linear(pixels[3], 9 * head.channels[3], head.channels[3])
    full = shape.height_px * shape.width_px
    per_frame += _linear(64 * h * w, 9 * f, neck) + _linear(full, 9 * neck, 32) + _linear(full, 32, outputs)
    to_pixel_frames = _linear(shape.frames, frames, outputs * full)
    # Interpolation in time has no weights: its backward pass costs one product, as a leaf's does.
    return Cost(linear=frames * per_frame, leaf=to_pixel_frames)


def _camera_head(dim: int, frames: int, pixel_frames: int) -> Cost:
    hidden = dim // 2
    return Cost(
        linear=_linear(frames, 2 * dim, hidden)
        + _linear(frames, hidden, hidden)
        + _linear(pixel_frames, hidden, hidden)
        + _linear(pixel_frames, hidden, POSE),
        leaf=_linear(pixel_frames, frames, hidden),
    )
