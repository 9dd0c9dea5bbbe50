#!/usr/bin/env bash
# Train on several hosts: run the same command on each. All arguments go to `mbgd train` of this clone.
#
#   HOSTS=1:2 MAIN_HOST=10.0.0.1 RUN_ID=mine launch/multinode.sh run.dir=/shared/runs/mine averaging=reproducible
#
# If a host is lost, the others restart from the newest checkpoint with the remaining hosts, down to MIN; a host that
# comes back or joins (the same command there) is taken in, up to MAX. If MAIN_HOST is lost, the others wait 10 minutes
# for it: start the same command there again, and all go on.
#
# HOSTS      MIN:MAX hosts, or a fixed number
# MAIN_HOST  the rendezvous host, by an address that all hosts can reach; add :PORT if 29400 is in use
# RUN_ID     a name for this run, the same on all its hosts
# WORKERS    workers of this host; default: the number of its GPUs, or 2 without GPUs
# RESTARTS   how often workers may restart; default: 3
# INTERFACE  the network interface between the hosts; default: the one that routes to MAIN_HOST
# KEY_FILE   a file with a secret, the same on all hosts and closed to others (chmod 600): openssl rand -hex 32
# NAME_SECONDS  how long to wait until MAIN_HOST's name is known, as on Kubernetes; default: 120
#
# The network between the hosts must be private: docs/clusters.md.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
for name in HOSTS MAIN_HOST RUN_ID; do
    if [ -z "${!name:-}" ]; then
        echo "error: $name is not set; $0 needs HOSTS, MAIN_HOST and RUN_ID (see the comment at its top)" >&2
        exit 2
    fi
done
WORKERS="${WORKERS:-auto}"
if ! [[ "$WORKERS" =~ ^([1-9][0-9]{0,5}|auto|gpus)$ ]]; then
    echo "error: WORKERS=$WORKERS; it must be a whole number >= 1: how many processes train on this host" >&2
    exit 2
fi
# gloo and nccl guess an interface, torchrun guesses an address and whether this is MAIN_HOST; with several interfaces
# the guesses are often wrong.
if command -v ip >/dev/null; then
    until main_address="$(getent ahostsv4 "${MAIN_HOST%%:*}" | awk 'NR == 1 { print $1 }')"; do
        if [ "$SECONDS" -ge "${NAME_SECONDS:-120}" ]; then
            echo "error: MAIN_HOST=$MAIN_HOST: no host of this name is known after ${NAME_SECONDS:-120} s" >&2
            exit 1
        fi
        sleep 1
    done
    on_main_host="$(ip -o addr show to "$main_address" | awk 'NR == 1 { print $2 }')"
    INTERFACE="${INTERFACE:-${on_main_host:-$(ip -o route get "$main_address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')}}"
    address="$(ip -o -4 addr show dev "$INTERFACE" | awk 'NR == 1 { sub("/.*", "", $4); print $4 }')"
    known=(--local-addr "$address" --rdzv-conf "last_call_timeout=10,is_host=$([ -n "$on_main_host" ] && echo 1 || echo 0)")
else
    known=(--local-addr "$(hostname -I | awk '{ print $1 }')")
fi
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$INTERFACE}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$INTERFACE}"
fi
if [ -n "${KEY_FILE:-}" ]; then
    export MBGD_KEY_FILE="$KEY_FILE"
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec python3 "$here/train.py" workers="$WORKERS" --nnodes "$HOSTS" --max-restarts "${RESTARTS:-3}" \
    --rdzv-endpoint "$MAIN_HOST" --rdzv-id "$RUN_ID" "${known[@]}" "$@"
