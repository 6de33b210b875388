#!/usr/bin/env bash
# Start a script on every GPU of this machine, or on as many ranks as asked for.
#
#   launch/torchrun.sh examples/char_lm.py --parallel fsdp2
#   NPROC_PER_NODE=2 launch/torchrun.sh train.py
#
#   NPROC_PER_NODE   ranks: by default one for each GPU, and 1 where there is none
#   MAX_RESTARTS     how often all ranks are started again after one has failed (0): the script has to
#                    continue from its checkpoint then
#   PYTHON           by default that of .venv, if there is one, else python3
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$here/launch/common.sh"

require_script "$@"
require_count NPROC_PER_NODE "${NPROC_PER_NODE=$(count_gpus)}"
require_count MAX_RESTARTS "${MAX_RESTARTS=0}" 0
restart_safely
export OMP_NUM_THREADS=${OMP_NUM_THREADS-1} # ranks that share a machine slow each other down otherwise
exec "$PYTHON" -m torch.distributed.run --standalone \
    --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS" "$@"
