"""bf16 products on one device, checked against fp32 and timed; run by `fw doctor` as a process of its own."""

import ctypes
import json
import signal
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.doctor_gpu import GEMM_MARK

WARM_UP, TIMED = 3, 20
CHECKED = 64  # rows and columns of the result that are computed again in fp32


class Shape(NamedTuple):
    rows: int
    inner: int
    columns: int


# The video tokens of a clip through the widest layers of both model sizes, and one product that keeps any GPU busy.
ON_GPU = (Shape(16_322, 1536, 8960), Shape(16_322, 8960, 1536), Shape(16_322, 5120, 5120), Shape(8192, 8192, 8192))
ON_CPU = (Shape(256, 256, 256),)


def main(device_name: str) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the doctor
    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    found: dict[str, Any] = {
        "name": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "tflops": None,
        "error": "",
    }
    best = 0.0
    for shape in ON_GPU if on_gpu else ON_CPU:
        generator = torch.Generator(device).manual_seed(0)
        a = torch.randn(shape.rows, shape.inner, generator=generator, device=device).bfloat16()
        b = torch.randn(shape.columns, shape.inner, generator=generator, device=device).bfloat16()
        error = relative_error(a @ b.T, a, b)
        if not error < 0.01:
            found["error"] = f"wrong numbers: {'x'.join(map(str, shape))} differs from fp32 by {error:.3g}"
            break
        best = max(best, speed(a, b))
    found["tflops"] = round(best, 3)
    print(GEMM_MARK + json.dumps(found), flush=True)


def relative_error(product: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest difference to fp32 over a corner, a stride and the last rows, against the largest value; NaN stays NaN."""
    rows = torch.linspace(0, a.shape[0] - 1, CHECKED, device=a.device).long()
    columns = torch.linspace(0, b.shape[0] - 1, CHECKED, device=a.device).long()
    exact = a[rows].double() @ b[columns].double().T
    found = product[rows][:, columns].double()
    return ((found - exact).abs().max() / exact.abs().max()).item()


def speed(a: Tensor, b: Tensor) -> float:
    """TFLOP/s."""
    for _ in range(WARM_UP):
        a @ b.T
    _finish(a)
    start = time.perf_counter()
    for _ in range(TIMED):
        a @ b.T
    _finish(a)
    return 2 * a.shape[0] * a.shape[1] * b.shape[0] * TIMED / (time.perf_counter() - start) / 1e12


def _finish(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


if __name__ == "__main__":
    main(sys.argv[1])
