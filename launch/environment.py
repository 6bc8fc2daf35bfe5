"""Which environment variables reach the hosts, and with which values. launch/env.sh gives the reasons of the values."""

import re
from collections.abc import Mapping
from pathlib import Path

# DeepSpeed writes `export NAME="value"` into a line that a shell on each host reads, and pdsh replaces %h, %n and %u in it.
PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./^-]*")

TRAVEL = frozenset({
    "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_IB_GID_INDEX",
    "NCCL_IB_TC", "NCCL_IB_TIMEOUT", "NCCL_IB_RETRY_CNT", "NCCL_IB_QPS_PER_CONNECTION", "NCCL_NET_GDR_LEVEL",
    "NCCL_P2P_DISABLE", "NCCL_CROSS_NIC", "NCCL_NVLS_ENABLE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_TOPO_FILE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_AVOID_RECORD_STREAMS", "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS", "DS_ACCELERATOR",
    "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "PYTHONPATH", "LD_LIBRARY_PATH",
})  # fmt: skip
SUSPECTS = re.compile(r"(TORCH_)?NCCL_|GLOO_|OMP_")  # whoever sets one of these expects it to arrive

# What the programs between this one and the hosts need here. PATH and LD_LIBRARY_PATH may travel too, hence the filter.
LOCAL = ("HOME", "USER", "LOGNAME", "SSH_AUTH_SOCK", "LANG", "TMPDIR", "DS_ACCELERATOR")
PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")


def travelling(environ: Mapping[str, str]) -> dict[str, str]:
    """What reaches the hosts."""
    chosen = {name: environ[name] for name in sorted(TRAVEL & environ.keys())}
    for name, value in chosen.items():
        check_plain(value, f"the environment variable {name}")
    return chosen


def left_behind(environ: Mapping[str, str]) -> list[str]:
    """Variables that somebody may believe to reach the hosts, and do not."""
    return sorted(name for name in environ if SUSPECTS.match(name) and name not in TRAVEL)


def check_plain(value: str, what: str) -> None:
    """An error for text that a shell on another host, or pdsh, could take for more than text."""
    if not PLAIN.fullmatch(value):
        raise ValueError(
            f"{what} is {value!r}, which a shell on the hosts could read as more than a value; use letters, digits and "
            f"_ @ + = : , . / ^ - only"
        )


def local_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's launcher and of pdsh here: nothing else of ours can travel by their rules."""
    kept = {name: environ[name] for name in LOCAL if name in environ}
    for name in PATHS:
        folders = [folder for folder in environ.get(name, "").split(":") if folder and PLAIN.fullmatch(folder)]
        if folders:
            kept[name] = ":".join(folders)
    return kept


def write_env_file(path: Path, variables: Mapping[str, str]) -> None:
    """The file that DeepSpeed reads through DS_ENV_FILE."""
    path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
