"""Which versions of what are installed here, and what cannot be imported."""

import importlib
import importlib.metadata
import platform
import sys
from contextlib import redirect_stdout
from typing import Any, NamedTuple


class Package(NamedTuple):
    distribution: str
    module: str
    purpose: str = ""  # of what is not needed for training


NEEDED = (
    Package("torch", "torch"),
    Package("deepspeed", "deepspeed"),
    Package("numpy", "numpy"),
    Package("safetensors", "safetensors"),
    Package("einops", "einops"),
    Package("PyYAML", "yaml"),
    Package("av", "av"),
    Package("blosc2", "blosc2"),
    Package("webdataset", "webdataset"),
    Package("tensorboard", "tensorboard"),
)
OPTIONAL = (
    Package("diffusers", "diffusers", "encoding with Wan's VAE"),
    Package("transformers", "transformers", "encoding texts and first frames"),
    Package("flash-attn", "flash_attn", "faster attention"),
)


class Installed(NamedTuple):
    versions: tuple[tuple[str, str], ...]
    broken: tuple[tuple[str, str], ...]


def installed() -> Installed:
    """Imports what training needs; of the rest only the versions are looked up."""
    versions, broken = [("python", platform.python_version())], []
    for package in NEEDED:
        try:
            with redirect_stdout(sys.stderr):  # what a package says of itself does not belong into a table
                module = importlib.import_module(package.module)
            versions.append((package.distribution, _version(package, module)))
            versions += _libraries(module) if package.module == "torch" else []
        except Exception as error:  # a package may fail in its own way: a missing library, another's version
            broken.append((package.distribution, f"{type(error).__name__}: {error}"))
    for package in OPTIONAL:
        try:
            versions.append((package.distribution, importlib.metadata.version(package.distribution)))
        except importlib.metadata.PackageNotFoundError:
            versions.append((package.distribution, "-"))
    return Installed(tuple(versions), tuple(broken))


def print_imports() -> int:
    """`fw doctor --import`."""
    found = installed()
    purposes = {package.distribution: package.purpose for package in OPTIONAL}
    for name, version in found.versions:
        print(f"{name:14}{version}" + (f"  (only for {purposes[name]})" if version == "-" else ""))
    for name, why in found.broken:
        print(f"{name:14}MISSING  {why}")
    if found.broken:
        names = " ".join(name for name, _ in found.broken)
        print(f"cannot be imported: {names}; pip install -r requirements.txt")
    return 1 if found.broken else 0


def _libraries(torch: Any) -> list[tuple[str, str]]:
    """Of a CUDA build, what images replace without touching torch's own version."""
    if torch.version.cuda is None:
        return []
    return [("cuda", torch.version.cuda), ("nccl", ".".join(map(str, torch.cuda.nccl.version())))]


def _version(package: Package, module: object) -> str:
    """Of what was imported: a folder that shadows a package may have no metadata of its own."""
    version = getattr(module, "__version__", None)
    return str(version) if version else importlib.metadata.version(package.distribution)
