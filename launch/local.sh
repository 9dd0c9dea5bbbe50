#!/usr/bin/env bash
# Train on this host: one worker per GPU, or WORKERS CPU processes. All arguments go to train.py.
#
#   launch/local.sh batch.size=512 model=cnn data=fashion_mnist
#   WORKERS=4 launch/local.sh averaging=ddp
#
# WORKERS  number of workers; default: the number of GPUs, or 2 where there is none
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${WORKERS:-}" ]; then
    gpus="$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)"
    WORKERS="$(( gpus > 0 ? gpus : 2 ))"
fi
if ! [[ "$WORKERS" =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "error: WORKERS=$WORKERS; it must be a whole number >= 1: how many processes train on this host" >&2
    exit 2
fi
# The cores are shared out evenly: more threads than cores would slow every worker down.
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( cores / WORKERS > 0 ? cores / WORKERS : 1 ))}"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec python3 -m mbgd.torchrun --nproc-per-node "$WORKERS" "$here/train.py" "$@"
