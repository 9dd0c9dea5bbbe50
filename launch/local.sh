#!/usr/bin/env bash
# Train on this host: one worker per GPU, or WORKERS CPU processes. All arguments go to `mbgd train` of this clone.
#
#   launch/local.sh batch.size=512 model=cnn data=fashion_mnist
#   WORKERS=4 launch/local.sh averaging=ddp
#
# WORKERS  number of workers; default: the number of GPUs, or 2 without GPUs
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
WORKERS="${WORKERS:-auto}"
if ! [[ "$WORKERS" =~ ^([1-9][0-9]{0,5}|auto|gpus)$ ]]; then
    echo "error: WORKERS=$WORKERS; it must be a whole number >= 1: how many processes train on this host" >&2
    exit 2
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec python3 "$here/train.py" workers="$WORKERS" "$@"
