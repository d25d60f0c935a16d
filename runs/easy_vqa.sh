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
SHAPE_STEPS=${SHAPE_STEPS:-300} # of 1,200 tokens, about 30 questions
STEPS=${STEPS:-2000}            # of as many
HELD_OUT=${HELD_OUT:-400}       # pictures
MORE=${MORE:-}                  # more flags for sft.py, such as --threads=1

[ -f "$MODEL/config.json" ] || { echo "error: no model in $MODEL; run make demo" >&2; exit 2; }
[ -f "$OUT/test.jsonl" ] ||
    "$BIN/python" -m runs.easy_vqa "$QUESTIONS" "$IMAGES" "$OUT" "$HELD_OUT"

# Colors are learned in minutes, shapes are not: one row in eight asks for one, and the others drown
# what it teaches. So the first stage asks for shapes alone and the second asks everything. The ViT
# trains in both, for the demo's pictures have other colors, and their shapes in nine places.
flags() {
    if [ "$1" = full ]; then
        echo --knowledge.lr_vision=1e-3 --knowledge.lr_projector=2e-3 --knowledge.lr_llm=1e-3 \
            --instruction.lr_vision=3e-4 --instruction.lr_projector=1e-3 --instruction.lr_llm=1e-3
    else
        echo --lora_rank=64 --lora_alpha=64 --lora_vision=True \
            --knowledge.lr_vision=3e-3 --knowledge.lr_projector=2e-3 --knowledge.lr_llm=3e-3 \
            --instruction.lr_vision=1e-3 --instruction.lr_projector=1e-3 --instruction.lr_llm=3e-3
    fi
}
for method in $METHODS; do
    start=$SECONDS
    "$BIN/python" sft.py config/toy_sft.py --init_from="$MODEL" --out_dir="$OUT/$method" \
        --stages=knowledge,instruction --tokens_per_pack=1200 \
        --knowledge.data="$OUT/shapes.jsonl" --instruction.data="$OUT/train.jsonl" \
        --knowledge.steps="$SHAPE_STEPS" --instruction.steps="$STEPS" \
        --knowledge.warmup_steps=30 --instruction.warmup_steps=30 $(flags "$method") $MORE
    echo "$method: $((SECONDS - start)) seconds of training"
    "$BIN/python" eval.py --model="$OUT/$method/instruction" --benchmarks="$OUT/test.jsonl" \
        --scorer=exact --out_dir="$OUT/scores_$method"
done
