#!/usr/bin/env bash
# A language base for runs/paper_in_miniature.sh that was made without some families of questions,
# so that fine-tuning has something to teach: out/paper_base/llm. Then its gate.
#
#     bash runs/paper_base.sh
#     LLM=out/paper_base/llm PAPER=out/paper_taught bash runs/paper_in_miniature.sh
#
# A part whose folder is there is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS

BIN=${BIN:-.venv/bin}
BASE=${BASE:-out/paper_base}    # everything lands here, its data too
# What fine-tuning shall teach: counting and existence to knowledge, formats and two pictures to
# instruction, questions of two steps to preference. See toy/families.py.
WITHOUT=${WITHOUT:-count,exists,neighbour,formats,comparison,steps}
STEPS=${STEPS:-8000}            # with clean words; a third as many follow with noise
QUESTIONS=${QUESTIONS:-200}     # of each family, for the gate
MORE=${MORE:-}                  # more flags for each part, such as --dtype=float32

export OMP_NUM_THREADS=1
torchrun="$BIN/torchrun --standalone --nproc_per_node=2"
noisy=$((STEPS / 3 + 1))

# words NAME SEED STEPS: samples for so many steps of two packs of 800 tokens, of 70 tokens each
words() {
    "$BIN/python" -m toy --out="$BASE/words_$1" --seed="$2" --n=$((24 * $3)) --parts=text \
        --without="$WITHOUT"
}

if [ ! -f "$BASE/clean/config.json" ]; then
    words clean 102 "$STEPS"
    $torchrun -m toy.bases llm --data="$BASE/words_clean/text.jsonl" --out_dir="$BASE/clean" \
        --steps="$STEPS" $MORE
fi
if [ ! -f "$BASE/llm/config.json" ]; then
    words noisy 103 "$noisy"
    $torchrun -m toy.bases llm_noise --data="$BASE/words_noisy/text.jsonl" \
        --init_from="$BASE/clean" --out_dir="$BASE/llm" --steps="$noisy" $MORE
fi
"$BIN/python" -m toy.gate --model="$BASE/llm" --per_family="$QUESTIONS" --without="$WITHOUT" |
    tee "$BASE/gate.txt"
echo "$(((SECONDS - start) / 60)) minutes; $BASE/gate.txt has what it knows"
