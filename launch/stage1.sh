#!/usr/bin/env bash
# Stage 1 on the hosts of a hostfile: 8 hosts of 8 GPUs as published, or any shape that the global batch allows.
#   launch/stage1.sh HOSTFILE [--config FILE] [section.key=value ...]        launch/stage1.sh --help
# Paths are relative to the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
python=.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
exec "$python" -m launch.nodes --stage stage1 --config configs/stage1.yaml "$@"
