"""What there is to know of one machine. Nothing here judges, and nothing fails for what it finds."""

import contextlib
import hashlib
import logging
import os
import resource
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

import launch
from fw_train.code_version import code_version
from launch.doctor_facts import Asked, NodeFacts, Read, Space
from launch.doctor_gpu import ask_nvidia_smi, cublas_version, run_gemms
from launch.doctor_packages import installed

log = logging.getLogger(__name__)

SMI_TIMEOUT_S = 10.0
GEMM_TIMEOUT_S = 25.0
PACKAGES = ("fw_train", "data_tools", "launch")


def look_at_node(asked: Asked, local_rank: int | None) -> NodeFacts:
    """All facts of this machine; `local_rank` looks at its own GPU alone, None at all of them."""
    log.debug("importing packages")
    packages = installed()
    devices, note = devices_here(local_rank, dict(packages.broken))
    log.debug("asking nvidia-smi")
    gpus, smi_note = ask_nvidia_smi(SMI_TIMEOUT_S) if not note else ((), note)
    log.debug("multiplying")
    gemms = run_gemms(devices, GEMM_TIMEOUT_S)
    reads = []
    for path, read in (
        *((path, read_dataset) for path in asked.datasets),
        *((path, read_file) for path in asked.files),
    ):
        log.debug("reading %s", path)  # where a dead file system holds for ever whoever asks
        reads.append(read(path))
    log.debug("looking at %s and the code", asked.folder)
    own_name = socket.gethostname()
    return NodeFacts(
        own_name=own_name,
        own_address=resolve(own_name),
        interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
        resolved=tuple((host, resolve(host)) for host in asked.hosts),
        version=code_version(),
        tree=tree_hash(),
        packages=packages.versions,
        broken=packages.broken,
        gpus=gpus,
        gpu_note=smi_note,
        cublas=cublas_version(),
        gemms=gemms,
        shm=space("/dev/shm") if Path("/dev/shm").is_dir() else None,
        disk=space(asked.folder),
        memory_free=free_memory(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=infiniband(),
        environment=tuple((name, os.environ[name]) for name in asked.variables if name in os.environ),
        port_error=port_error(asked.port) if asked.port is not None else "",
        reads=tuple(reads),
    )


def tree_hash() -> str:
    """A hash of the names and bytes of all source files, for images carry no git."""
    top = Path(launch.__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for name in PACKAGES for path in (top / name).rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(top)} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()[:12]


def resolve(name: str) -> str:
    """The IPv4 address of a name; empty where there is none."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return ""


def space(path: str) -> Space | None:
    """The file system of a folder, or of the nearest one above it that exists."""
    folder = existing(path)
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return Space(str(folder), usage.total, usage.free)


def existing(path: str) -> Path:
    """The folder itself, or the nearest above it that exists."""
    folder = Path(path).absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def free_memory() -> int:
    """Bytes that can still be taken: of the machine, or what this container's limit leaves."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free


def infiniband() -> tuple[tuple[str, str], ...]:
    """Ports and their states."""
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*/state"))
    return tuple((f"{port.parts[-4]}:{port.parts[-2]}", port.read_text().strip()) for port in ports)


def port_error(port: int) -> str:
    """Why nobody could listen on a port here; empty where one can."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(1)
        except OSError as error:
            return f"{port}, where ranks would meet: {error.strerror}"
    return ""


def read_dataset(path: str) -> Read:
    """The manifest, and one sample's bytes."""
    try:
        from fw_train.data.manifest import MANIFEST, Dataset  # needs NumPy, which may be what is missing here

        dataset = Dataset(path)
        dataset.read(0)
        dataset.close()
        digest = hashlib.sha256((Path(path) / MANIFEST).read_bytes()).hexdigest()[:12]
    except (ImportError, OSError, ValueError) as error:
        return Read(path, "", str(error))
    return Read(path, f"{len(dataset)} samples, manifest {digest}")


def read_file(path: str) -> Read:
    """The files of a checkpoint, each with its size; of one the first bytes are read."""
    place = Path(path)
    try:
        files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
        for file in files:
            with open(file, "rb") as opened:
                opened.read(1)
        return Read(path, _sizes(files))
    except OSError as error:
        return Read(path, "", f"{error.filename or path}: {error.strerror}")


def _sizes(files: Iterable[Path]) -> str:
    sizes = [file.stat().st_size for file in files]
    return f"{len(sizes)} file{'s' * (len(sizes) != 1)}, {sum(sizes)} bytes"


def devices_here(local_rank: int | None, broken: dict[str, str]) -> tuple[list[str], str]:
    """What products are to be tried on, and why that is no GPU."""
    if "torch" in broken:
        return [], "torch cannot be imported"
    import torch

    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return ["cpu"], why
    count = torch.cuda.device_count()
    if local_rank is None:
        return [f"cuda:{index}" for index in range(count)], ""
    return [f"cuda:{0 if count == 1 else local_rank}"], ""
