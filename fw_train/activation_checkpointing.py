"""Activation checkpointing, applied from outside to the model's shard units.

`full` keeps each unit's inputs and computes the rest again in the backward pass; `selective` also keeps the outputs of
attention, which cost the most to compute and the least to keep; `none` keeps everything.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fw_train.model.world import ShardUnit

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)

# PyTorch's fused attention kernels, and those that the flash-attn packages register.
_ATTENTION = ("aten::_scaled_dot_product_", "flash_attn::", "flash_attn_3::")


def apply_activation_checkpointing(units: Sequence[ShardUnit], mode: Mode) -> None:
    """Makes every unit recompute itself; parameter names, hooks and the units' own code stay as they are."""
    if mode not in MODES:
        raise ValueError(f"no activation checkpointing mode `{mode}`; there are {', '.join(MODES)}")
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in the network is random
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    for unit in units:
        # The instance attribute hides the class's forward, so that __call__ and its hooks run around the recomputed part.
        unit.module.forward = _recomputed(unit.module.forward, options)


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    # A function of its own and no functools.partial, which torch.compile would skip with everything inside it.
    def recompute(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    return recompute


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = op._schema.name if isinstance(op, torch._ops.OpOverload) else ""
    keep = name.startswith(_ATTENTION) and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
