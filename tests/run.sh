#!/usr/bin/env bash
# The whole check: makes or reuses .venv, installs, then ruff, mypy and pytest. On a fresh machine this is the only command needed.
#   bash tests/run.sh [--slow] [--multinode] [pytest arguments]
# --multinode adds the tests that build several hosts, SLURM and images on this machine: root, and the packages of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/.."

multinode='' words=()
for word; do
    if [ "$word" = --multinode ]; then multinode=yes; else words+=("$word"); fi
done

. launch/venv.sh

# One thread a process, a process a core: small tensors gain nothing from threads.
export OMP_NUM_THREADS=1 PYTHONHASHSEED=0 HF_HUB_OFFLINE=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "${words[@]}"

if [ -z "$multinode" ]; then
    echo "tests/run.sh: left out the tests that build several hosts on this machine; --multinode runs them too"
    exit
fi
# One after the other: each of them keeps every core busy by itself. 5: none among the chosen ones.
.venv/bin/python -m pytest --multinode -m multinode "${words[@]}" || [ $? = 5 ]
