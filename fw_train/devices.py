"""What the makers publish about accelerators: the one table of peaks and memories."""

from typing import NamedTuple


class Device(NamedTuple):
    """Dense figures, without the doubling that sparsity is given in data sheets."""

    bf16_tflops: float
    memory_gb: float  # 10^9 bytes, as sold
    source: str


DEVICES = {
    "H20": Device(148.0, 96.0, "NVIDIA HGX H20 specification: 148 TFLOP/s, 96 GB HBM3"),
    "H100": Device(989.0, 80.0, "NVIDIA H100 data sheet, SXM: 1,979 TFLOP/s with sparsity, 80 GB"),
    "H100-PCIE": Device(756.0, 80.0, "NVIDIA H100 data sheet, PCIe: 1,513 TFLOP/s with sparsity, 80 GB"),
    "H200": Device(989.0, 141.0, "NVIDIA H200 data sheet, SXM: 1,979 TFLOP/s with sparsity, 141 GB"),
    "H800": Device(989.0, 80.0, "as H100 SXM, with slower NVLink"),
    "A100": Device(312.0, 80.0, "NVIDIA A100 data sheet: 312 TFLOP/s, 80 GB"),
    "A100-80G": Device(312.0, 80.0, "NVIDIA A100 data sheet: 312 TFLOP/s, 80 GB"),
    "A100-40G": Device(312.0, 40.0, "NVIDIA A100 data sheet: 312 TFLOP/s, 40 GB"),
    "A800": Device(312.0, 80.0, "as A100 80 GB, with slower NVLink"),
    "L40S": Device(362.0, 48.0, "NVIDIA L40S data sheet: 362 TFLOP/s, 733 with sparsity, 48 GB"),
    "L20": Device(119.5, 48.0, "NVIDIA L20 data sheet: 119.5 TFLOP/s, 48 GB"),
    "B200": Device(2250.0, 180.0, "NVIDIA DGX B200 data sheet: 8 GPUs with 36,000 TFLOP/s sparse, 1,440 GB"),
}


def device(name: str) -> Device:
    """The figures of a device by its name here, in any case."""
    found = DEVICES.get(name.upper())
    if found is None:
        raise ValueError(f"no figures for the device `{name}`; there are {', '.join(map(str.lower, DEVICES))}")
    return found


def peak_flops(full_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name that its driver gives, or None for one that is not known."""
    for name in sorted(DEVICES, key=len, reverse=True):
        if all(word in full_name.upper() for word in name.split("-")):
            return DEVICES[name].bf16_tflops * 1e12
    return None
