"""Which code this is."""

import subprocess
from pathlib import Path

import fw_train


def code_version() -> str:
    """`git describe` of the checkout that the package runs from, or what its image says, beside the package's version."""
    folder = Path(fw_train.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--tags"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        revision = folder / "revision.txt"  # an image has no repository; its build wrote this
        found = revision.read_text().strip() if revision.is_file() else ""
    return f"{fw_train.__version__} {found}".strip()
