"""GPUs as nvidia-smi tells them, and bf16 products in processes of their own, where a crash is a finding and not the end."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence

from launch.doctor_facts import Gemm, Gpu

# Long-lived names: nvidia-smi refuses the whole question for one that it does not know.
FIELDS = (
    "index", "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm",
    "clocks_throttle_reasons.active", "ecc.mode.current", "ecc.errors.uncorrected.volatile.total", "temperature.gpu",
)  # fmt: skip
GEMM_MARK = "fw-doctor-gemm "


def ask_nvidia_smi(timeout_s: float) -> tuple[tuple[Gpu, ...], str]:
    """All GPUs of this machine, or why nothing is known of them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError:
        return (), "no nvidia-smi here"
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi gave no answer for {timeout_s:g} s"
    if done.returncode:
        return (), f"nvidia-smi ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}"
    return parse_gpus(done.stdout), ""


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The lines of nvidia-smi's answer to FIELDS."""
    gpus = []
    for line in text.strip().splitlines():
        parts = [part.strip() for part in line.split(", ")]
        if len(parts) != len(FIELDS):
            raise ValueError(f"nvidia-smi answered {line!r}; {len(FIELDS)} values were asked for")
        index, name, driver, memory, used, clock, max_clock, slowed, ecc, errors, temperature = parts
        uncorrected, bits = _number(errors), _known(slowed)
        gpus.append(
            Gpu(
                int(index), name, driver, _number(memory), _number(used), _number(clock), _number(max_clock),
                None if bits is None else int(bits, 16), _known(ecc),
                None if uncorrected is None else int(uncorrected), _number(temperature),
            )
        )  # fmt: skip
    return tuple(gpus)


def run_gemms(devices: Sequence[str], timeout_s: float) -> tuple[Gemm, ...]:
    """One child process for each device, all at once."""
    children = {
        device: subprocess.Popen(
            [sys.executable, "-m", "launch.doctor_gemm", device],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for device in devices
    }
    return tuple(_outcome(device, child, timeout_s) for device, child in children.items())


def cublas_version() -> str:
    """Of the cuBLAS that torch brings; empty where it brings none."""
    for name in ("nvidia-cublas-cu12", "nvidia-cublas"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _outcome(device: str, child: "subprocess.Popen[str]", timeout_s: float) -> Gemm:
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return Gemm(device, "", None, f"no result within {timeout_s:g} s")
    for line in out.splitlines():
        if line.startswith(GEMM_MARK) and child.returncode == 0:
            return Gemm(device, **json.loads(line.removeprefix(GEMM_MARK)))
    how = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"ended with {child.returncode}"
    last = err.strip().splitlines()[-1:] or ["it said nothing"]
    return Gemm(device, "", None, f"{how}: {last[0][:300]}")


def _known(text: str) -> str | None:
    return None if not text or text.startswith("[") or text == "N/A" else text


def _number(text: str) -> float | None:
    known = _known(text)
    return None if known is None else float(known)
