#!/usr/bin/env bash
# Own rows, from file to score: the demo's model learns easy-VQA (github.com/vzhou842/easy-VQA,
# 64-pixel pictures of one shape, 13 answers), fully and with adapters, on one process.
#
#     make demo
#     git clone https://github.com/vzhou842/easy-VQA
#     bash runs/easy_vqa.sh easy-VQA/data/train/questions.json easy-VQA/data/train/images
#
# 400 pictures are held out. METHODS=full or METHODS=lora trains one of the two.
set -euo pipefail
cd "$(dirname "$0")/.."

QUESTIONS=${1:?give the file of questions and the folder of pictures, see the head of this file}
IMAGES=${2:?give the folder (or the .tar) of pictures after the file of questions}
BIN=${BIN:-.venv/bin}
MODEL=${MODEL:-out/demo/model}  # the model to start from
OUT=${OUT:-out/easy_vqa}        # rows, run folders, scores
METHODS=${METHODS:-full lora}
STEPS=${STEPS:-2000}            # of 1,200 tokens, about 34 questions
HELD_OUT=${HELD_OUT:-400}       # pictures

[ -f "$MODEL/config.json" ] || { echo "error: no model in $MODEL; run make demo" >&2; exit 2; }
[ -f "$OUT/test.jsonl" ] ||
    "$BIN/python" -m runs.easy_vqa "$QUESTIONS" "$IMAGES" "$OUT" "$HELD_OUT"

flags() {
    if [ "$1" = full ]; then
        echo --instruction.lr_vision=1e-3 --instruction.lr_projector=2e-3 --instruction.lr_llm=1e-3
    else  # adapters need about ten times the rate; the projector has none and trains as it is
        echo --lora_rank=16 --lora_alpha=32 --lora_vision=True \
            --instruction.lr_vision=5e-3 --instruction.lr_projector=2e-3 --instruction.lr_llm=5e-3
    fi
}
for method in $METHODS; do
    start=$SECONDS
    # Colors and shapes are new to the demo's ViT, so it trains, too.
    "$BIN/python" sft.py config/toy_sft.py --init_from="$MODEL" --out_dir="$OUT/$method" \
        --stages=instruction --instruction.data="$OUT/train.jsonl" --tokens_per_pack=1200 \
        --instruction.steps="$STEPS" --instruction.warmup_steps=50 $(flags "$method")
    echo "$method: $((SECONDS - start)) seconds of training"
    "$BIN/python" eval.py --model="$OUT/$method/instruction" --benchmarks="$OUT/test.jsonl" \
        --scorer=exact --out_dir="$OUT/scores_$method"
done
