"""What a training step keeps and needs on a GPU: found by taking the step on the meta device, where nothing is computed.

The forward pass, the losses and the backward pass are those of training; every storage that comes and goes is counted.
Two kernels are stood in for, because the CPU's keep other tensors than a GPU's: attention and the RMS norm. And all
pixels count as valid, which is the most that the losses can select from.
"""

import logging
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fw_train.activation_checkpointing import Mode, apply_activation_checkpointing
from fw_train.batch import LATENT_CHANNELS, SPATIAL_STRIDE, Batch, latent_frames
from fw_train.build import on_meta, world_params
from fw_train.config import Config
from fw_train.model.world import FantasyWorldModel
from fw_train.precision import PRECISIONS
from fw_train.run.params import step_params
from fw_train.stages import ParameterGroup, apply_stage, stage_rules
from fw_train.step import train_step

CLIP_TOKENS = 257


class StepMemory(NamedTuple):
    """Bytes of one micro-batch beside the weights and what the engine holds; the first three are kept for the backward pass."""

    inputs: int  # of the batch as the step gets it, labels above all
    blocks: int  # by the network up to the heads
    heads: int  # by the heads and the losses
    working: int  # at the peak, beyond what is kept
    executed_flops: float  # recomputation included

    @property
    def peak(self) -> int:
        return self.inputs + self.blocks + self.heads + self.working


def measure_step(config: Config, mode: Mode, size_px: tuple[int, int]) -> StepMemory:
    """Takes a step of the configuration with this checkpointing at this size (height, width)."""
    train = config.train
    model = meta_model(config)
    apply_activation_checkpointing(model.shard_units(), mode)
    for parameter in model.parameters():
        if parameter.requires_grad:  # engines take gradients away as they come; their buckets are counted elsewhere
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    live = LiveBytes(model)
    model.head_point.register_forward_pre_hook(lambda *_: live.enter("heads"))
    empty_text = torch.empty(config.data.text_tokens, config.model.text_dim, device="meta")
    with gpu_kernels(), live:
        live.enter("inputs")
        batches = [meta_batch(config, train.micro_batch, size_px)]
        live.enter("blocks")
        # The step's own arguments are all that holds the batch, as in training: what no gradient needs goes with them.
        total = train_step(model, batches.pop(), step_params(config), empty_text).total
        kept = live.by_phase.copy()
        total.backward()
    return StepMemory(kept["inputs"], kept["blocks"], kept["heads"], live.peak - sum(kept.values()), live.flops)


def meta_model(config: Config) -> FantasyWorldModel:
    """The network without storage, with what the stage trains marked."""
    return meta_network(config)[0]


def meta_network(config: Config) -> tuple[FantasyWorldModel, list[ParameterGroup]]:
    """The same and its optimiser groups."""
    model = on_meta(lambda: FantasyWorldModel(world_params(config)), PRECISIONS[config.train.precision].params)
    rules_log = logging.getLogger("fw_train.stages")
    before = rules_log.level
    rules_log.setLevel(logging.WARNING)  # a plan looks at the network several times; the rules are news once at most
    try:
        return model, apply_stage(model, stage_rules(config.train.stage, config.train.gate_lr_scale))
    finally:
        rules_log.setLevel(before)


def meta_batch(config: Config, samples: int, size_px: tuple[int, int]) -> Batch:
    """What `BatchMaker` gives for clips of a size, without storage; positions are real."""
    m, (height, width), frames = config.model, size_px, config.data.frames
    wan = world_params(config).wan
    inputs, latent = wan.inputs, latent_frames(frames)
    space = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(samples, *shape, dtype=dtype, device="meta")

    labels = config.train.stage != "stage0"
    return Batch(
        latents=empty(LATENT_CHANNELS, latent, *space),
        text=empty(config.data.text_tokens, m.text_dim),
        clip=empty(CLIP_TOKENS * (2 if m.image_position else 1), m.clip_dim) if inputs.clip else None,
        image_latents=empty(inputs.image_channels, latent, *space) if inputs.image_channels else None,
        control_latents=empty(LATENT_CHANNELS, latent, *space) if inputs.control_latents else None,
        reference_latents=empty(LATENT_CHANNELS, *space) if m.reference_conv else None,
        control_camera=empty(inputs.camera_channels, latent, height, width) if inputs.camera_channels else None,
        pose9=empty(frames, 9) if labels else None,
        depth=empty(frames, height, width) if labels else None,
        valid=empty(frames, height, width, dtype=torch.bool) if labels else None,
        points=empty(frames, 3, height, width) if labels else None,
        position=torch.arange(samples),
    )


class LiveBytes(TorchDispatchMode):
    """Counts the storages on a kind of device that exist, the model's own left out, and the FLOPs of what runs."""

    def __init__(self, model: nn.Module, device_type: str = "meta") -> None:
        super().__init__()
        self._device_type = device_type
        self.now = self.peak = 0
        self.by_phase: dict[str, int] = defaultdict(int)
        self.flops = 0.0
        self._phase = ""
        self._known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

    def enter(self, phase: str) -> None:
        """What is made from now on belongs to this phase until it goes."""
        self._phase = phase

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            out = args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device_type:
                self._add(tensor.untyped_storage())
        counted = flop_registry.get(func._overloadpacket)
        if counted is not None:
            self.flops += counted(*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        key, size, phase = storage._cdata, storage.nbytes(), self._phase
        self._known.add(key)
        self._count(phase, size)
        weakref.finalize(storage, self._gone, key, size, phase)

    def _gone(self, key: int, size: int, phase: str) -> None:
        self._known.discard(key)
        self._count(phase, -size)

    def _count(self, phase: str, size: int) -> None:
        self.by_phase[phase] += size
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Within it, attention is FlashAttention and the RMS norm one kernel, as on a GPU: they keep what those keep."""
    attention, rms_norm = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention, F.rms_norm = _flash_attention, _one_kernel_rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, rms_norm


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _one_kernel_rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    return _RmsNorm.apply(x, weight)


class _RmsNorm(torch.autograd.Function):
    """Shapes alone; keeps its input, its weight and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
