#!/usr/bin/env bash
# The tests, with the flags of pytest: bash runs/test.sh -k packing
set -euo pipefail
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 "${BIN:-.venv/bin}/python" -m pytest "$@"
