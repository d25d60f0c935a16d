#!/usr/bin/env bash
# The paper's three claims on the toy world, with intervals, and one page about them:
# out/paper/docs/experiments.md, a copy of docs/experiments.md with the tables of this run. Every
# number of its tables stands in a line of the .jsonl beside it.
#
#     bash runs/paper_in_miniature.sh
#     PARTS=tiers bash runs/paper_in_miniature.sh             # how to choose fine-tuning data
#     PAGE=docs/experiments.md bash runs/paper_in_miniature.sh    # the page of the repository
#
# A run that was stopped goes on where it was. Whoever changes a setting below gives another PAPER.
set -euo pipefail
cd "$(dirname "$0")/.."

BIN=${BIN:-.venv/bin}
PAPER=${PAPER:-out/paper}       # everything lands here, the toy data too
PAGE=${PAGE:-$PAPER/docs/experiments.md}
LLM=${LLM:-toy/llm_basic}       # the language base, of runs/paper_base.sh
PARTS=${PARTS:-captions growth sft curriculum}
SEEDS=${SEEDS:-5}               # how many; each has a projector, data, noise and order of its own
STEPS=${STEPS:-200}             # of alignment and of advance, from which fine-tuning starts
BUDGETS=${BUDGETS:-6,15,40,100}           # steps of alignment and of advance
SFT_BUDGETS=${SFT_BUDGETS:-25,60,140,320}    # steps of fine-tuning
N=${N:-3000}                    # pictures for pretraining
N_SFT=${N_SFT:-1093,830,270}    # samples of knowledge, instruction, preference
RATE=${RATE:-0.5}               # times those of config/toy_sft.py, in all arms of the curriculum
WRONG=${WRONG:-25,10,0}         # percent of their answers that belong to another picture
N_BENCH=${N_BENCH:-100}         # questions of each of the five benchmarks
N_STEPS=${N_STEPS:-500}         # questions of two steps
N_WEB=${N_WEB:-1200}            # pictures of the caption pipeline
N_TIER=${N_TIER:-800,600,200}   # samples of each candidate for fine-tuning
QUICK=${QUICK:-400}             # samples of a mix in the tier quick
TIER_STEPS=${TIER_STEPS:-90,360}    # of fine-tuning in the tier quick, and in all others

export OMP_NUM_THREADS=1
levels=knowledge,instruction,preference
bench="--data_dir=$PAPER/bench --benchmarks=toy,toy_steps --num_workers=0"
# Pretraining on one core: packs of what two processes of the demo have together.
pretrain="config/toy.py --init_from=$PAPER/fresh_{seed} --data=$PAPER/pretrain_{seed}/pretrain-*.tar
    --tokens_per_pack=960 --max_tiles_per_pack=80 --threads=1 --save_every=1000"
# Fine-tuning in one stage, on one core: half the peak rates of config/toy_sft.py.
fine="config/toy_sft.py --init_from=$PAPER/start_{seed}/advance --tokens_per_pack=400 --threads=1
    --save_every=1000 --knowledge.lr_vision=3e-4 --knowledge.lr_projector=1.25e-3
    --knowledge.lr_llm=1.25e-4"
candidates=(clean wrong_10 wrong_25 off_topic)
mkdir -p "$PAPER"

# has PART: whether this part is to run
has() { [[ " $PARTS " == *" $1 "* ]]; }

# ---- what it will take ----
# In hundredths of a second of one core: a step of fine-tuning 13, of pretraining 22, an evaluation
# with its start 1,700; a model of the caption pipeline 8,500.
sum() { echo $((${1//,/+})); }
count() { wc -w <<< "${1//,/ }"; }
core=$((SEEDS * (2 * STEPS * 22 + 2000)))
has captions && core=$((core + 20000 + N_WEB * 15 + SEEDS * 2 * 8500))
has growth && core=$((core + SEEDS * (2 * $(sum "$BUDGETS") * 22 + $(count "$BUDGETS") * 4000)))
has sft && core=$((core
    + SEEDS * 2 * ($(sum "$SFT_BUDGETS") * 13 + $(count "$SFT_BUDGETS") * 1700)))
has curriculum && core=$((core + SEEDS * 6 * ($(sum "$N_SFT") * 13 * 10 / 44 + 1700)))
has tiers && core=$((core
    + SEEDS * 4 * ($(sum "$TIER_STEPS") * 13 + 2 * 1700) + 9 * (${TIER_STEPS#*,} * 13 + 1700)))
minutes=$((core / 100 / 60 / 2 + 1))
echo "planned: about $minutes minutes on two free cores ($SEEDS seeds)"

# queue COMMAND...: the command for every seed, {seed} filled in
jobs=()
queue() {
    local seed
    for ((seed = 1; seed <= SEEDS; seed++)); do
        jobs+=("$(printf '%q ' "${@//\{seed\}/$seed}")")
    done
}
# run_queue: what is queued, two at a time
run_queue() {
    printf '%s\0' "${jobs[@]}" | xargs -0 -P 2 -n 1 bash -c
    jobs=()
}

# largest_first 1,2,3: the numbers, so that no long job comes last
largest_first() { tr , '\n' <<< "$1" | sort -rn; }

# told PART: note how long it took, since the part before it
told() {
    times > "$PAPER/times"
    awk -v part="$1" -v seconds="$((SECONDS - before))" -v cpu_before="$cpu_before" '
        NR == 2 {
            split($1, own, /[ms]/)
            split($2, kernel, /[ms]/)
            cpu = 60 * (own[1] + kernel[1]) + own[2] + kernel[2]
            printf "{\"part\": \"%s\", \"seconds\": %d, \"cpu_seconds\": %.0f}\n",
                part, seconds, cpu - cpu_before >> FILE
            print cpu
        }' FILE="$PAPER/minutes.jsonl" "$PAPER/times" > "$PAPER/cpu"
    before=$SECONDS
    cpu_before=$(< "$PAPER/cpu")
}
before=$SECONDS
cpu_before=0

# ---- data of each seed, the questions, and the models that fine-tuning starts from ----
toy="$BIN/python -m toy"
$toy --out="$PAPER/bench" --parts=bench,steps --seed=9002 --n_bench="$N_BENCH" --n_steps="$N_STEPS"
for ((seed = 1; seed <= SEEDS; seed++)); do
    $toy --out="$PAPER/pretrain_$seed" --seed=$((1000 + seed)) --n="$N" --parts=pretrain
    $toy --out="$PAPER/noisy_$seed" --seed=$((1000 + seed)) --n="$N_SFT" --wrong="$WRONG" \
        --parts=$levels --two_steps=True
    $toy --out="$PAPER/clean_$seed" --seed=$((1000 + seed)) --n="$N_SFT" \
        --parts=$levels --two_steps=True
    if [ ! -f "$PAPER/fresh_$seed/config.json" ]; then
        "$BIN/python" convert.py assemble --vision=toy/vit --llm="$LLM" --seed="$seed" \
            --out="$PAPER/fresh_$seed"
    fi
done
# Patterns of shards are for our own reader: bash must not fill them in.
set -f
queue "$BIN/python" train.py $pretrain --seed={seed} --out_dir="$PAPER/start_{seed}" \
    --alignment.steps="$STEPS" --advance.steps="$STEPS"

# ---- growth with pretraining data ----
# It needs none of these models, so it fills the core that an odd number of seeds leaves idle.
if has growth; then
    for budget in $(largest_first "$BUDGETS"); do
        queue "$BIN/python" -m runs.scaling plan --run=True --out_dir="$PAPER/growth" \
            --steps="$budget" --seeds={seed} --train="$pretrain" \
            --sft="config/toy_sft.py --stages=knowledge --knowledge.steps=60 --threads=1 \
                --tokens_per_pack=1200 --max_tiles_per_pack=80 --save_every=1000 \
                --knowledge.data='$PAPER/clean_{seed}/knowledge-*.tar'" \
            --model=sft/knowledge --eval="$bench --threads=1"
    done
fi
run_queue
told pretraining

# ---- recaptions against alt-text ----
if has captions; then
    BIN=$BIN CURATE="$PAPER/captions" WEB="$PAPER/web" N_WEB=$N_WEB LLM="$LLM" NEW_CAPTIONS=no \
        SEEDS="$(seq -s ' ' 1 "$SEEDS")" FRESH="$PAPER/fresh_{seed}" bash runs/curate_demo.sh
    told captions
fi

# ---- where fine-tuning starts; growth with its data, by the quality of the set ----
queue bash -c '[ -f "$1/eval/results.json" ] || "${@:2}" --model="$1/advance" --out_dir="$1/eval"' \
    start "$PAPER/start_{seed}" "$BIN/python" eval.py $bench --threads=1
if has sft; then
    for budget in $(largest_first "$SFT_BUDGETS"); do
        for quality in clean noisy; do
            sets=$PAPER/${quality}_{seed}
            data="$sets/knowledge-*.tar,$sets/instruction-*.tar,$sets/preference-*.tar"
            queue "$BIN/python" -m runs.scaling plan --run=True --out_dir="$PAPER/sft_$quality" \
                --steps="$budget" --seeds={seed} --stages=knowledge \
                --sft="$fine --knowledge.data='$data'" --eval="$bench --threads=1"
        done
    done
fi
run_queue
told fine-tuning

# ---- the order of fine-tuning data, apart from the schedule ----
if has curriculum; then
    arms="-m runs.curriculum plan --out_dir=$PAPER/curriculum --start=$PAPER/start_{seed}/advance
        --data=$PAPER/noisy_{seed} --rate=$RATE"
    questions="--eval=$bench --threads=1"
    # The orders are written first: two jobs read those of a seed.
    "$BIN/python" $arms --seeds="$(seq -s , 1 "$SEEDS")" "$questions" > "$PAPER/arms.txt"
    for schedule in three one; do
        queue "$BIN/python" $arms --schedules=$schedule --seeds={seed} --run=True "$questions"
    done
    run_queue
    told curriculum
fi

# ---- which candidate to fine-tune on: does a quick tier rank as the full one does? ----
if has tiers; then
    sets=""
    for k in "${!candidates[@]}"; do
        name=${candidates[k]}
        for ((seed = 1; seed <= SEEDS; seed++)); do
            # Of other pictures than those of the other candidates.
            new="$toy --out=$PAPER/tiers/$name/$seed --seed=$((2000 + 100 * k + seed))"
            if [ "$name" = off_topic ]; then
                $new --n=$(sum "$N_TIER") --parts=pretrain
            else
                wrong=${name#*_}
                $new --n="$N_TIER" --wrong="${wrong/clean/0}" --two_steps=True --parts=$levels
            fi
        done
        sets+="${sets:+,}$name=$PAPER/tiers/$name/{seed}/*.tar"
    done
    # tier NAME SAMPLES STEPS FOLDER: one tier of curate.py for every seed, queued
    tier() {
        queue "$BIN/python" curate.py "$1" --in="$sets" --n="$2" --run=True --stage=knowledge \
            --out="$PAPER/tiers/$4_{seed}" --sft="$fine --knowledge.steps=$3" \
            --eval="$bench --threads=1"
    }
    few=${TIER_STEPS%,*}
    many=${TIER_STEPS#*,}
    tier quick "$QUICK" "$few" quick
    tier quick 0 "$many" full
    # The two that build a mix have one seed, on as many samples as one candidate has.
    SEEDS=1 tier composition "$(sum "$N_TIER")" "$many" composition
    SEEDS=1 tier incremental "$(sum "$N_TIER")" "$many" incremental
    run_queue
    told tiers
fi

# ---- figures and the page ----
for part in growth sft_clean sft_noisy; do
    if has "${part%_*}"; then
        "$BIN/python" -m runs.scaling fit --out_dir="$PAPER/$part"
    fi
done
if has curriculum; then
    "$BIN/python" -m runs.curriculum compare --out_dir="$PAPER/curriculum"
fi
if [ ! -f "$PAGE" ]; then
    mkdir -p "$(dirname "$PAGE")"
    cp docs/experiments.md "$PAGE"
    cp docs/experiments.jsonl "${PAGE%.md}.jsonl"
fi
"$BIN/python" -m runs.paper_page --out_dir="$PAPER" --page="$PAGE" --llm="$LLM"
echo "$SECONDS seconds; look at $PAGE"
