#!/usr/bin/env bash
# Train a small language model on two ranks, or on all GPUs where there are several.
#
#   launch/demo.sh                    # clipped: it learns
#   launch/demo.sh --unclipped        # the same without clipping
#   launch/demo.sh --parallel fsdp2   # more options: examples/char_lm.py --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

gpus=$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')
export OMP_NUM_THREADS=1 # one core a rank: ranks that share a machine slow each other down otherwise
mkdir -p runs
exec .venv/bin/torchrun --standalone --nproc-per-node "$((gpus > 2 ? gpus : 2))" examples/char_lm.py \
    --history "runs/demo-$(date +%Y%m%d-%H%M%S).jsonl" "$@"
