#!/usr/bin/env bash
# Stage 2 on the hosts of a hostfile: 14 hosts of 8 GPUs as published, or any shape that the global batch allows.
#   launch/stage2.sh HOSTFILE [--config FILE] [section.key=value ...]        launch/stage2.sh --help
# Paths are relative to the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
python=.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
exec "$python" -m launch.nodes --stage stage2 --config configs/stage2.yaml "$@"
