#!/usr/bin/env bash
# Run the test-suite; arguments go to pytest.
#
#   launch/test.sh
#   launch/test.sh tests/layout -k norm
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
bash launch/system.sh

export OMP_NUM_THREADS=1 # tests start ranks of their own: one core each
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
