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
    if q.dtype in (torch.bfloat16, torch.float16):
        if q.is_cuda:
            return _half_kernel(q, k, v)
        if q.is_cpu:  # whose kernel for half precision takes eight times as long in backward as the one for fp32
            return _scaled_dot_product(q.float(), k.float(), v.float()).to(q.dtype)
    return _scaled_dot_product(q, k, v)


def choose_kernel(device: torch.device) -> str:
    """Picks the fastest kernel that can be imported for half precision on this device, for the whole process; logged.

    To be called before the first forward pass: inside one, torch.compile could not look through the imports.
    """
    global _half_kernel
    name, _half_kernel = "scaled_dot_product_attention", _scaled_dot_product
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        for module, runs in (("flash_attn_interface", major == 9), ("flash_attn", major >= 8)):
            if not runs:  # FlashAttention 3 has kernels for Hopper alone
                continue
            try:
                flash = importlib.import_module(module).flash_attn_func
            except ImportError:
                continue
            name, _half_kernel = module, functools.partial(_flash, flash)
            break
    log.info("attention on %s: %s", device, name)
    return name


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _flash(flash: Callable[..., Tensor | tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = flash(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # some releases of FlashAttention 3 return the log-sum-exp too


_half_kernel: Kernel = _scaled_dot_product
