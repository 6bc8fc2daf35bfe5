"""The one table of number formats, and the check that a built model follows it.

Parameters and compute share one dtype; a few small, sensitive computations ("islands") upcast their weights inside forward.
"""

import re
from typing import NamedTuple

import torch
from torch import nn


class Precision(NamedTuple):
    params: torch.dtype  # of the network's parameters, trainable or frozen
    compute: torch.dtype  # of matrix products and attention
    master: torch.dtype  # of the optimiser's copy of the trainable parameters, and of its moments
    gradients: torch.dtype  # in which gradients are accumulated and reduced
    vae: torch.dtype  # frozen and numerically sensitive: group norms overflow in half precision
    loss_scaling: bool  # gradients would vanish without a dynamic scale


PRECISIONS = {
    "bf16": Precision(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.float32, loss_scaling=False),
    "fp16": Precision(torch.float16, torch.float16, torch.float32, torch.float32, torch.float32, loss_scaling=True),
    "fp32": Precision(torch.float32, torch.float32, torch.float32, torch.float32, torch.float32, loss_scaling=False),
}


class Island(NamedTuple):
    pattern: str  # of module names
    why: str


# Everything else in the network computes in Precision.compute. Outside modules, these are fp32 as well: timesteps, rotary tables
# and the rotation, shift, scale and gate of every sub-block, the activations of the dense heads, all losses.
FP32_ISLANDS = (
    Island(r"video\.time_embedding(\..*)?", "bf16 tells apart 294 of the 1000 shifted timesteps"),
    Island(r"video\.time_projection(\..*)?", "scales and shifts of every block follow from it"),
    Island(r"pose_enc(\..*)?", "neighbouring cameras differ by less than bf16 resolves"),
    Island(r"head_camera\.out", "the same, on the way out"),
    Island(r".*\.norm(_?[a-z]*\d?)?(_img)?(\.\d+)?|.*\.norms\.\d+|.*\.img_emb\.proj\.[04]", "means and variances"),
)


class PrecisionError(ValueError):
    """Tensors on another dtype than the table says."""


def in_island(module_name: str) -> bool:
    """Whether a module of the network computes in fp32."""
    return any(re.fullmatch(island.pattern, module_name) for island in FP32_ISLANDS)


def assert_uniform(model: nn.Module, dtype: torch.dtype) -> None:
    """Raises with the name of every floating parameter or buffer of `model` that is not `dtype`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    strays = [f"{name} ({t.dtype})" for name, t in tensors if t.is_floating_point() and t.dtype != dtype]
    if strays:
        raise PrecisionError(
            f"{len(strays)} tensors are not {dtype}: {', '.join(strays[:20])}{', ...' if len(strays) > 20 else ''}; "
            f"build modules directly in that dtype, or cast the whole module with .to({dtype}) after adding to it"
        )
