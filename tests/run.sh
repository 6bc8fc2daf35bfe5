#!/usr/bin/env bash
# The whole check: makes or reuses .venv, installs, then ruff, mypy and pytest. On a fresh machine this is the only command needed.
#   bash tests/run.sh [--slow] [--multinode] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "tests/run.sh: Python 3.11 or newer is needed, $("$python" --version) found; set PYTHON=/path/to/python3.11" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# Reinstall only when what is to be installed has changed.
stamp=.venv/installed-$(cat requirements.txt pyproject.toml | sha256sum | cut -c1-16)
if [ ! -e "$stamp" ]; then
    echo "installing into .venv (a few minutes the first time)"
    export DS_BUILD_OPS=0  # none of DeepSpeed's own kernels is used on this path
    .venv/bin/python -m pip install --quiet --requirement requirements.txt
    .venv/bin/python -m pip install --quiet --no-deps --editable .
    rm -f .venv/installed-*
    touch "$stamp"
fi

# One thread a process, a process a core: small tensors gain nothing from threads.
export OMP_NUM_THREADS=1 PYTHONHASHSEED=0 HF_HUB_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
