#!/usr/bin/env bash
# What needs a CUDA device: its tests, and what clipping costs there. Installs nothing and needs no index: it runs this
# source tree with a Python that has torch and pytest (and Accelerate, for its part). Goes on after a failure.
#
#   launch/gpu.sh             # results into runs/gpu
#   launch/gpu.sh FOLDER
#
#   STEPS     some of: bandwidth tests sweep llama models moe accelerate   (all of them but sweep)
#   SCALE     of the widths of Llama-7B: what the memory has room for, four times over (1)
#   PYTHON    by default that of .venv, if there is one, else python3
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$here/launch/common.sh"
out=$(realpath -m "${1-$here/runs/gpu}")
steps=${STEPS-bandwidth tests llama models moe accelerate}

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    fail "$PYTHON sees no CUDA device (or has no torch)"
mkdir -p "$out"
cd "$here" || exit
export PYTHONUNBUFFERED=1 PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS-1}
failed=()

step() { # name command…
    [[ " $steps " == *" ${1%% *} "* ]] || return 0
    local name=${1// /-} start=$SECONDS
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.log"
    ((PIPESTATUS[0] == 0)) || failed+=("$name")
    echo "== $name took $((SECONDS - start)) s"
}

pytest=("$PYTHON" -m pytest -q -s -m gpu -W default)
bench=("$PYTHON" -m distclip.bench --device cuda --rounds 25)
step bandwidth "${pytest[@]}" tests/gpu/test_triton.py -k bandwidth
step tests "${pytest[@]}" tests/gpu
step sweep "$PYTHON" -m tests.gpu.sweep
for dtype in bfloat16 float32; do
    step "llama $dtype" "${bench[@]}" --shapes llama --scale "${SCALE-1}" --dtype $dtype \
        --placements plain ddp_bucket_view --cases first unclipped clipped --json "$out/llama-$dtype.json"
done
step models "${bench[@]}" --shapes small medium --placements plain ddp_bucket_view \
    --cases first unclipped clipped changing step --json "$out/models.json"
step moe "${bench[@]}" --rounds 7 --shapes moe --placements plain ddp_bucket_view --json "$out/moe.json"
step accelerate "${pytest[@]}" tests/integrations/test_accelerate.py tests/launch/test_accelerate.py

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
