#!/usr/bin/env bash
# On a machine with a GPU: is it correct there, then every row of docs/speed.md that needs one.
# Each part is cut off after its time, so that all end within ten minutes. The rows that were
# measured by then are in $OUT/rows.txt. Without a network: BIN=FOLDER_OF_PYTHON make gpu.
set -uo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"

part() {
    local seconds=$1
    shift
    timeout "$seconds" "$BIN/python" -m "$@" 2>&1 | tee -a "$OUT/rows.txt"
}
part 90 pytest -m gpu tests
part 90 bench attn --rounds=5
part 30 bench ce --rounds=5
part 130 bench train --rounds=5
part 40 bench stages --rounds=5
part 120 bench vs-hf --rounds=5 --rows=2b
part 30 bench decode --rounds=5
part 40 bench warmup
