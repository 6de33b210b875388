#!/usr/bin/env bash
# Start a script on several machines. Run the same line on each of them, in any order:
#
#   NNODES=2 RDZV_ENDPOINT=10.0.0.1:29500 launch/multinode.sh examples/char_lm.py --parallel fsdp2
#
#   NNODES           how many machines
#   RDZV_ENDPOINT    host:port, the same everywhere: one of the machines, and a port that is free on it. That
#                    machine finds out by itself that it is the one.
#   NPROC_PER_NODE   ranks on this machine: by default one for each GPU, and 1 where there is none
#   IFACE            the network interface that ranks talk over (gloo and NCCL), eth0 say: by default the one
#                    that leads to RDZV_ENDPOINT
#   RDZV_ID          names the job, where several use the same endpoint (distclip)
#   MAX_RESTARTS     how often all ranks are started again after one has failed (0)
#   JOIN_TIMEOUT     seconds to wait for the other machines (600)
#   PYTHON           by default that of .venv, if there is one, else python3
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$here/launch/common.sh"

[[ -n ${NNODES-} ]] || fail "NNODES is not set: on how many machines does this run?"
require_count NNODES "$NNODES"
[[ -n ${RDZV_ENDPOINT-} ]] ||
    fail "RDZV_ENDPOINT is not set: host:port of one of the machines, the same on all, 10.0.0.1:29500 say"
[[ $RDZV_ENDPOINT =~ ^.+:[0-9]+$ ]] ||
    fail "RDZV_ENDPOINT='$RDZV_ENDPOINT': expected host:port, 10.0.0.1:29500 say"
require_script "$@"
require_count NPROC_PER_NODE "${NPROC_PER_NODE=$(count_gpus)}"
require_count MAX_RESTARTS "${MAX_RESTARTS=0}" 0
require_count JOIN_TIMEOUT "${JOIN_TIMEOUT=600}"

# Whether this machine is the endpoint, the address that the others reach it at, and the interface that has it:
# by its name alone, as torchrun goes by, a machine with several interfaces does not know.
found=$("$PYTHON" "$here/launch/address.py" "$RDZV_ENDPOINT" "${IFACE-}") || fail "$found"
read -r is_host address interface <<<"$found"

export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
restart_safely
export OMP_NUM_THREADS=${OMP_NUM_THREADS-1} # ranks that share a machine slow each other down otherwise
echo "${0##*/}: $address on $interface, one of $NNODES machines, with $NPROC_PER_NODE ranks;" \
    "meeting at $RDZV_ENDPOINT for up to $JOIN_TIMEOUT s" >&2
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID-distclip}" \
    --rdzv-conf "is_host=$is_host,join_timeout=$JOIN_TIMEOUT,read_timeout=$JOIN_TIMEOUT" \
    --local-addr "$address" "$@"
