#!/usr/bin/env bash
# On a machine with a GPU: is it correct there, then every row of docs/speed.md that needs one.
# Each part is cut off after its time, so that all end within ten minutes. The rows that were
# measured by then are in $OUT/rows.txt. Exits with 1 if a part failed; a part that was only cut
# off is named, and is no failure. Without a network: BIN=FOLDER_OF_PYTHON make gpu.
set -uo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"

NEEDED="torch triton numpy PIL tiktoken safetensors tqdm pytest transformers"
for package in $NEEDED; do
    if ! "$BIN/python" -c "import $package" 2> /dev/null; then
        echo "error: $BIN/python has no $package; this script needs: $NEEDED" >&2
        exit 1
    fi
done

failed=()
part() {
    local seconds=$1
    shift
    timeout "$seconds" "$BIN/python" -m "$@" 2>&1 | tee -a "$OUT/rows.txt"
    local status=$?
    if [ "$status" = 124 ]; then
        echo "$*: cut off after $seconds s" | tee -a "$OUT/rows.txt"
    elif [ "$status" != 0 ]; then
        failed+=("$*")
    fi
}
part 90 pytest -m gpu tests
part 90 bench attn --rounds=5
part 30 bench ce --rounds=5
part 130 bench train --rounds=5
part 40 bench stages --rounds=5
part 120 bench vs-hf --rounds=5 --rows=2b
part 30 bench decode --rounds=5
part 40 bench warmup

if [ ${#failed[@]} != 0 ]; then
    printf 'error: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
