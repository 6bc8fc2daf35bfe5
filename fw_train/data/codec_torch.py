"""The last step of geo1 decoding in torch, on any device: deltas to float32 labels, bit for bit what numpy computes.

Axes: N frames, P planes (1 depth, 3 points), H x W pixels.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fw_train.data.codec import Codes
from fw_train.data.codec_format import Kind
from fw_train.data.codec_planes import exp_table
from fw_train.data.codec_points import unproject


class CodeTensors(NamedTuple):
    """`Codes` as tensors: what can be collated, shared between processes, pinned and moved."""

    kind: Kind
    log_step: float
    lossy: Tensor  # int64 [L]
    deltas: Tensor  # uint16 [L, P, H, W]
    parameters: Tensor  # [L, 1 or 14]
    lossless: Tensor  # int64 [N - L]
    exact: Tensor  # [N - L, P, H, W]
    exact_valid: Tensor  # bool [N - L, H, W]


class Labels(NamedTuple):
    """Decoded frames."""

    values: Tensor  # float32: depth [N, H, W] or points [N, 3, H, W], as `Batch` has them
    valid: Tensor  # bool [N, H, W]


def as_tensors(codes: Codes) -> CodeTensors:
    """The same codes, sharing memory with the arrays."""
    arrays = (value for value in codes if isinstance(value, np.ndarray))
    return CodeTensors(codes.kind, codes.log_step, *map(torch.from_numpy, arrays))


def expand(codes: Codes | CodeTensors, device: torch.device | str) -> Labels:
    """Labels on the device; bit for bit what `decode_depth` and `decode_points` return."""
    device = torch.device(device)
    tensors = as_tensors(codes) if isinstance(codes, Codes) else codes
    kind, log_step = tensors.kind, tensors.log_step
    lossy, deltas, parameters, lossless, exact, exact_valid = (
        t.to(device, non_blocking=device.type != "cpu") for t in tensors if isinstance(t, Tensor)
    )
    planes = torch.empty(len(lossy) + len(lossless), *deltas.shape[1:], dtype=torch.float32, device=device)
    valid = torch.empty(len(planes), *deltas.shape[2:], dtype=torch.bool, device=device)
    if len(lossy):
        planes[lossy], valid[lossy] = _restore(kind, log_step, deltas, parameters)
    if len(lossless):
        planes[lossless], valid[lossless] = exact, exact_valid
    return Labels(planes[:, 0] if kind == "depth" else planes, valid)


def _restore(kind: Kind, log_step: float, deltas: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Planes [L, P, H, W] and validity [L, H, W]."""
    z_codes = _undelta(deltas[:, 0])
    valid = z_codes != 0
    z = _exp_table(log_step, deltas.device)[z_codes] * parameters[:, :1, None]
    if kind == "depth":
        return z[:, None], valid
    # Offsets are two's complement: the upper half of the codes is negative.
    du, dv = ((code - ((code >> 15) << 16)).float() for code in (_undelta(deltas[:, 1]), _undelta(deltas[:, 2])))
    height, width = z.shape[1:]
    u = torch.arange(width, dtype=torch.float32, device=z.device)[None]
    v = torch.arange(height, dtype=torch.float32, device=z.device)[:, None]
    planes = torch.stack(unproject(z, du, dv, u, v, parameters), dim=1)
    return torch.where(valid[:, None], planes, 0.0), valid


def _undelta(deltas: Tensor) -> Tensor:
    """Codes, int32 [L, H, W]: sums stay far inside int32, as rows and columns have at most 16384 entries of 16 bits."""
    code = deltas.view(torch.int16).to(torch.int32) & 0xFFFF  # few kernels know uint16
    code = (code >> 1) ^ -(code & 1)
    code = torch.cumsum(code, dim=-2, dtype=torch.int32) & 0xFFFF
    return torch.cumsum(code, dim=-1, dtype=torch.int32) & 0xFFFF


@cache
def _exp_table(log_step: float, device: torch.device) -> Tensor:
    return torch.from_numpy(exp_table(log_step).copy()).to(device)
