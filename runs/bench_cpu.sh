#!/usr/bin/env bash
# The CPU rows of docs/speed.md, half an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
for part in vs-hf attn ce train stages decode serving; do
    OMP_NUM_THREADS=2 "${BIN:-.venv/bin}/python" -m bench "$part" --device=cpu
done
