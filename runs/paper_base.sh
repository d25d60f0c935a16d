#!/usr/bin/env bash
# A language base for runs/paper_in_miniature.sh that was made without some families of questions,
# so that fine-tuning has something to teach: out/paper_base/llm. Then its gate.
#
#     bash runs/paper_base.sh
#     LLM=out/paper_base/llm PAPER=out/paper_mine bash runs/paper_in_miniature.sh
#
# A part whose folder is there is not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS

BIN=${BIN:-.venv/bin}
BASE=${BASE:-out/paper_base}    # everything lands here, its data too
# What fine-tuning shall teach: where things are, counting and existence to knowledge, multiple
# choice and two pictures to instruction, questions of two steps to preference. See toy/families.py.
WITHOUT=${WITHOUT:-where,neighbour,count,exists,choice,comparison,steps}
STEPS=${STEPS:-6000,4000,2000}  # with clean words, again on other documents, with noise on them
QUESTIONS=${QUESTIONS:-200}     # of each family, for the gate
MORE=${MORE:-}                  # more flags for each part, such as --dtype=float32

export OMP_NUM_THREADS=1
torchrun="$BIN/torchrun --standalone --nproc_per_node=2"
IFS=, read -r first again noisy <<< "$STEPS"

# words NAME SEED STEPS: samples for so many steps of two packs of 800 tokens, of 70 tokens each
words() {
    "$BIN/python" -m toy --out="$BASE/words_$1" --seed="$2" --n=$((24 * $3)) --parts=text \
        --without="$WITHOUT"
}

# train RECIPE NAME [FLAG...]: one part, with what it prints in train.log
train() {
    local before=$SECONDS
    $torchrun -m toy.bases "$1" --data="$BASE/words_$2/text.jsonl" $MORE "${@:3}"
    echo "$1: $(((SECONDS - before + 30) / 60)) minutes"
}

mkdir -p "$BASE"
if [ ! -f "$BASE/clean/config.json" ]; then
    words clean 102 "$first"
    train llm clean --out_dir="$BASE/clean" --steps="$first" | tee "$BASE/train.log"
fi
if [ ! -f "$BASE/again/config.json" ]; then
    words again 104 "$again"
    train llm again --init_from="$BASE/clean" --out_dir="$BASE/again" --steps="$again" |
        tee -a "$BASE/train.log"
fi
if [ ! -f "$BASE/llm/config.json" ]; then
    words noisy 103 "$noisy"
    train llm_noise noisy --init_from="$BASE/again" --out_dir="$BASE/llm" --steps="$noisy" |
        tee -a "$BASE/train.log"
    cp "$BASE/train.log" "$BASE/llm"
fi
# What it knows stands beside its weights, as lines of JSON.
"$BIN/python" -m toy.gate --model="$BASE/llm" --per_family="$QUESTIONS" --without="$WITHOUT" \
    --jsonl="$BASE/llm/gate.jsonl"
echo "$(((SECONDS - start) / 60)) minutes; $BASE/llm/gate.jsonl has what it knows"
