"""The one attention function of the network: FlashAttention 3 or 2 where they can run, PyTorch's fused kernel elsewhere.

Axes: B batch, L queries, S keys, H heads, D head width.
"""

import functools
import importlib
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v for q [B, L, H, D], k and v [B, S, H, D]; returns [B, L, H, D]."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _cuda_kernel(q.device)(q, k, v)
    return _scaled_dot_product(q, k, v)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@functools.cache
def _cuda_kernel(device: torch.device) -> Kernel:
    """The fastest kernel that can be imported for this device; chosen once and logged."""
    major, _ = torch.cuda.get_device_capability(device)
    name, kernel = "scaled_dot_product_attention", _scaled_dot_product
    for module, needs_major in (("flash_attn_interface", 9), ("flash_attn", 8)):
        if major < needs_major:
            continue
        try:
            flash = importlib.import_module(module).flash_attn_func
        except ImportError:
            continue
        name, kernel = module, functools.partial(_flash, flash)
        break
    log.info("attention on %s: %s", device, name)
    return kernel


def _flash(flash: Callable[..., Tensor | tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flash(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # some releases of FlashAttention 3 return the log-sum-exp too
