#!/usr/bin/env bash
# The toy world's own ViT and language model, from scratch: four parts of half an hour each.
#
#     bash runs/toy_bases.sh
#
# The weights in toy/vit and toy/llm were made in more parts than these, see toy/bases.py and
# docs/log.md. A part whose folder is there is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
OUT=${OUT:-out}                 # the four model folders
SHARDS=${SHARDS:-shards}        # their data
MORE=${MORE:-}                  # more flags for each part, such as --dtype=float32

# Two processes of one thread each are faster on two cores than one process of two threads.
export OMP_NUM_THREADS=1
torchrun="$BIN/torchrun --standalone --nproc_per_node=2"

# base RECIPE DATA [FLAG...]: train one part
base() {
    [ -f "$OUT/toy_$1/config.json" ] ||
        $torchrun -m toy.bases "$1" --data="$2" --out_dir="$OUT/toy_$1" $MORE "${@:3}"
}

# ---- the language model: words first, then words with noise ----
"$BIN/python" -m toy --out="$SHARDS/toy_llm" --n=230000 --seed=102 --parts=text
base llm "$SHARDS/toy_llm/text.jsonl"
"$BIN/python" -m toy --out="$SHARDS/toy_llm_noise" --n=150000 --seed=103 --parts=text
base llm_noise "$SHARDS/toy_llm_noise/text.jsonl" --init_from="$OUT/toy_llm"

# ---- does it answer the questions of the benchmarks from words? ----
"$BIN/python" -m toy --out="$SHARDS/toy_bench" --n=0 --n_bench=600 --seed=5 --parts=bench
"$BIN/python" -m toy.gate --model="$OUT/toy_llm_noise" --data_dir="$SHARDS/toy_bench"

# ---- the ViT: names of cells first, then captions and questions through the language model ----
"$BIN/python" -m toy --out="$SHARDS/toy_vit" --n=40000 --seed=101 --parts=pretrain
base vit "$SHARDS/toy_vit/pretrain-*.tar"
"$BIN/python" -m toy --out="$SHARDS/toy_vit_noise" --n=24000 --seed=101 --parts=drill
"$BIN/python" convert.py assemble --vision="$OUT/toy_vit" --llm="$OUT/toy_llm_noise" \
    --out="$OUT/toy_vit_start"
base vit_noise "$SHARDS/toy_vit_noise/drill-*.tar" --init_from="$OUT/toy_vit_start"
