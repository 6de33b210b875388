#!/usr/bin/env bash
# Run the tests with every torch, Python and framework that distclip claims to work with, and write
# docs/compatibility.md. Each row is a clone of what is committed, with an environment of its own, outside the
# repository, and removed afterwards.
#
#   launch/matrix.sh                               # all rows: two hours, some 3 GB of downloads for most
#   launch/matrix.sh torch-2.15 frameworks-oldest  # those
#   TESTS=tests/laws launch/matrix.sh torch-2.8    # other tests; nothing is written down
#   KEEP=1 launch/matrix.sh torch-2.15             # it stays, for a second look
#   REUSE=1 launch/matrix.sh torch-2.15            # with the environment that has stayed
#
# PYTHONS: a folder with one installation per release (3.10.13/bin/python), as pyenv has them; without it
# python3.10 and so on are looked for in PATH. MATRIX_DIR: where the rows are made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pythons=${PYTHONS-$HOME/.pyenv/versions}
room=${MATRIX_DIR:-${TMPDIR:-/tmp}/distclip-matrix}

# What needs no framework, and one entrance of each framework.
core="tests/apply tests/decide tests/device tests/house tests/inspection tests/integrations tests/kernels
    tests/laws tests/layout tests/measure tests/planning tests/step tests/strategies tests/torch_private
    tests/training tests/faults/test_found_at_random.py"
frameworks="tests/integrations tests/faults/test_22_integrations.py tests/faults/test_35_integrations.py
    tests/faults/test_48_lightning.py"
declare -A tests=([core]=$core [frameworks]=$frameworks [all]=tests)

# name, Python, torch, tests, what else is pinned. "pre": the newest pre-release. "default": those of
# launch/constraints.txt. "oldest": the least that pyproject.toml allows.
rows="
torch-2.6          3.10 2.6.0   core
torch-2.8          3.11 2.8.0   core
torch-2.10         3.12 2.10.0  core
torch-2.12         3.13 2.12.1  core
torch-2.13         3.11 2.13.0  all        default
torch-2.15         3.13 2.15.0  all
torch-next         3.13 pre     core
frameworks-oldest  3.11 2.13.0  frameworks oldest
frameworks-newest  3.11 2.13.0  frameworks
"

python_of() {
    local found=("$pythons/$1".*/bin/python)
    if [[ -x ${found[-1]} ]]; then echo "${found[-1]}"; else command -v "python$1"; fi
}

oldest() { # frameworks, of the optional dependencies
    sed -n '/^\[project.optional-dependencies\]/,/^\[project.scripts\]/p' pyproject.toml |
        grep -oE '"(accelerate|transformers|lightning|megatron-core)>=[0-9.]+' | sed 's/"//; s/>=\(.*\)/==\1.*/' | sort -u
}

newest_pre_release() {
    "$1" -m pip index versions torch --pre 2>/dev/null | sed -n 's/^torch (\(.*\))$/\1/p'
}

run_row() {
    local name=$1 python torch=$3 which=$4 pinned=${5:-} here=$room/$1 started=$SECONDS
    python=$(python_of "$2")
    if [[ $torch == pre ]]; then
        torch=$(newest_pre_release "$python")
        if [[ ! $torch =~ (a|b|rc|dev) ]]; then
            echo "$name: the index has no pre-release, its newest is $torch" >&2
            return
        fi
    fi
    echo "$name: torch $torch, Python $2, tests: $which" >&2
    if [[ -n ${REUSE:-} && -d $here/.venv ]]; then
        git -C "$here" fetch -q origin HEAD
        git -C "$here" reset -q --hard FETCH_HEAD
    else
        rm -rf "$here"
        git clone -q . "$here"
    fi
    echo "torch==$torch" >"$here.txt"
    case $pinned in
    default) cp launch/constraints.txt "$here.txt" ;;
    oldest) oldest >>"$here.txt" ;;
    esac
    (
        cd "$here"
        # A machine may have a constraint of its own, which is not meant here.
        PIP_CONSTRAINT=$here.txt PYTHON=$python DISTCLIP_CONSTRAINTS=$here.txt bash launch/setup.sh
        # shellcheck disable=SC2086
        OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n 2 --dist worksteal --junitxml "$here.xml" \
            ${TESTS:-${tests[$which]}} >"$here.log" 2>&1 || true
        tail -1 "$here.log" >&2
    )
    if [[ -z ${TESTS:-} ]]; then
        "$here/.venv/bin/python" launch/compatibility.py "$name" "$which" "$here.xml" $((SECONDS - started))
    fi
    if [[ -z ${KEEP:-} ]]; then rm -rf "$here"; fi
}

mkdir -p "$room"
while read -ra row; do
    if ((${#row[@]})) && { (($# == 0)) || [[ " $* " == *" ${row[0]} "* ]]; }; then
        run_row "${row[@]}" </dev/null
    fi
done <<<"$rows"
