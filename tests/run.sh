#!/usr/bin/env bash
# The whole check: makes or reuses .venv, installs, then ruff, mypy and pytest. On a fresh machine this is the only command needed.
#   bash tests/run.sh [--slow] [--multinode] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/venv.sh

# One thread a process, a process a core: small tensors gain nothing from threads.
export OMP_NUM_THREADS=1 PYTHONHASHSEED=0 HF_HUB_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
