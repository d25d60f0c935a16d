#!/usr/bin/env bash
# More data, better scores? Alignment and advance of 10 to 160 steps, each followed by the same
# fine-tuning and evaluation, with two seeds: out/scaling.
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
SHARDS=${SHARDS:-shards/toy}
OUT=out/scaling
export OMP_NUM_THREADS=1

"$BIN/python" -m toy --out="$SHARDS" --n=3000
if [ ! -f "$OUT/start/config.json" ]; then
    "$BIN/python" convert.py assemble --vision=toy/vit --llm=toy/llm --out="$OUT/start"
fi

"$BIN/python" -m runs.scaling plan --run=True --processes=2 \
    --steps=10,20,40,80,160 --seeds=1,2 \
    --train="config/toy.py --init_from=$OUT/start --data='$SHARDS/pretrain-*.tar'" \
    --sft="config/toy_sft.py --stages=knowledge --knowledge.steps=60 \
        --knowledge.data='$SHARDS/knowledge-*.tar'" \
    --model=sft/knowledge \
    --eval="--data_dir=$SHARDS --benchmarks=toy"
"$BIN/python" -m runs.scaling fit
"$BIN/python" -m runs.scaling plot
