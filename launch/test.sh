#!/usr/bin/env bash
# Run the test-suite; arguments go to pytest.
#
#   launch/test.sh
#   launch/test.sh tests/layout -k norm
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
bash launch/system.sh

# Tests start ranks of their own, which mostly wait for each other: one core each, and more workers than cores.
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -n 3 --dist worksteal "$@"
