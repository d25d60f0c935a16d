#!/usr/bin/env bash
# The CUDA path without a card: a stand-in for the driver that counts and computes nothing, then
# every stage of every recipe above it, and one table. Some cases: bash runs/nogpu.sh sft_2b decode
# NOGPU_BIN: the bin folder of an environment that has tests/nogpu/requirements.txt already.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-out/nogpu}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
if [ -z "${NOGPU_BIN:-}" ]; then
    [ -x "$OUT/venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$OUT/venv"
    "$OUT/venv/bin/python" -m pip install --quiet -r tests/nogpu/requirements.txt
    NOGPU_BIN=$OUT/venv/bin
fi

packages=$("$NOGPU_BIN/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
# What the CUDA wheels lack of their headers is in Triton's.
"${CC:-cc}" -O1 -shared -fPIC -fvisibility=hidden -o "$OUT/libcuda.so.1" tests/nogpu/*.c \
    -I"$packages/nvidia/cu13/include" -I"$packages/triton/backends/nvidia/include" -ldl -lpthread
ln -sf libcuda.so.1 "$OUT/libcuda.so"
exec "$NOGPU_BIN/python" tests/nogpu/proof.py --out="$OUT" "$@"
