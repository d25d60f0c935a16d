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
SHAPE_STEPS=${SHAPE_STEPS:-350} # of 1,200 tokens, about 34 questions
STEPS=${STEPS:-2000}            # of as many
HELD_OUT=${HELD_OUT:-400}       # pictures
MORE=${MORE:-}                  # more flags for sft.py, such as --threads=1

[ -f "$MODEL/config.json" ] || { echo "error: no model in $MODEL; run make demo" >&2; exit 2; }
[ -f "$OUT/test.jsonl" ] ||
    "$BIN/python" -m runs.easy_vqa "$QUESTIONS" "$IMAGES" "$OUT" "$HELD_OUT"

# One row in eight asks for a shape, and the others drown what it teaches. So a first stage asks for
# little else. All of the model trains in it, for adapters cannot teach words: the table of tokens
# is frozen beside them, and the demo's model has never written "rectangle", "yes" or "no".
train() {
    "$BIN/python" sft.py config/toy_sft.py --tokens_per_pack=1200 $MORE "$@"
}
start=$SECONDS
train --init_from="$MODEL" --out_dir="$OUT/first" --stages=knowledge \
    --knowledge.data="$OUT/shapes.jsonl" --knowledge.steps="$SHAPE_STEPS" \
    --knowledge.warmup_steps=30 \
    --knowledge.lr_vision=1e-3 --knowledge.lr_projector=2e-3 --knowledge.lr_llm=1e-3
echo "first stage: $((SECONDS - start)) seconds"

# The second stage asks everything.
flags() {
    if [ "$1" = full ]; then
        echo --instruction.lr_vision=3e-4 --instruction.lr_llm=1e-3
    else  # adapters take about ten times the rate
        echo --lora_rank=16 --lora_alpha=32 --lora_vision=True \
            --instruction.lr_vision=3e-3 --instruction.lr_llm=3e-3
    fi
}
for method in $METHODS; do
    start=$SECONDS
    train --init_from="$OUT/first/knowledge" --out_dir="$OUT/$method" --stages=instruction \
        --instruction.data="$OUT/train.jsonl" --instruction.steps="$STEPS" \
        --instruction.warmup_steps=30 --instruction.lr_projector=1e-3 $(flags "$method")
    echo "$method: $((SECONDS - start)) seconds"
    "$BIN/python" eval.py --model="$OUT/$method/instruction" --benchmarks="$OUT/test.jsonl" \
        --scorer=exact --out_dir="$OUT/scores_$method"
done
