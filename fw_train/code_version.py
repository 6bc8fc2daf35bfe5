"""Which code this is."""

import subprocess
from pathlib import Path

import fw_train


def code_version() -> str:
    """`git describe` of the checkout that the package runs from, or the version of the package."""
    folder = Path(fw_train.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--tags"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = ""
    return f"{fw_train.__version__} {found}".strip()
