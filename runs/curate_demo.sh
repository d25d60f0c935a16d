#!/usr/bin/env bash
# The caption pipeline on the toy world. Pictures with poor alt-text become a filtered recaption
# set, then models are pretrained on either set and compared. Everything lands in out/curate.
#
# The endpoint that writes reference captions and judges is tests/toy_endpoint.py. It knows the
# truth, fails 5 % of the requests and answers another 5 % in a wrong form.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS

BIN=${BIN:-.venv/bin}
OUT=${CURATE:-out/curate}
WEB=${WEB:-shards/toy_web}      # toy pictures as the web has them
N_WEB=${N_WEB:-2400}            # how many of them
SEEDS=${SEEDS:-1 2}             # of the models that are pretrained on either set
LLM=${LLM:-toy/llm}             # the language base
FRESH=${FRESH:-$OUT/start}      # what they start from; {seed} in it is the seed
STEPS_SHARE=${STEPS_SHARE:-100} # percent of the usual steps
NEW_CAPTIONS=${NEW_CAPTIONS:-yes}   # no: the pretrained models do not caption new pictures

export OMP_NUM_THREADS=1
torchrun="$BIN/torchrun --standalone --nproc_per_node=2"
curate="$BIN/python curate.py"
truth="$BIN/python tests/toy_endpoint.py"
# Captions of signs end in what is written there.
toy="--prompts=curation/prompts/toy --max_new_tokens=160 --ending=any"
mkdir -p "$OUT"

# share N: this part of N steps
share() { echo $(($1 * STEPS_SHARE / 100)); }

# ---- pictures, fine-tuning data, and the model to start from ----
"$BIN/python" -m toy --out="$WEB" --n="$N_WEB" --parts=web
"$BIN/python" -m toy --out="${WEB}_new" --n=200 --seed=9 --parts=web,bench
"$BIN/python" -m toy --out="${WEB}_sft" --n=800 --seed=8 --parts=knowledge
if [ ! -f "$OUT/start/config.json" ]; then
    "$BIN/python" convert.py assemble --vision=toy/vit --llm="$LLM" --out="$OUT/start"
fi

# ---- the endpoint, for as long as this script runs ----
rm -f "$OUT/url"
$truth serve "$OUT/url" "$WEB"/*.truth.jsonl &
trap "kill $!" EXIT
until [ -s "$OUT/url" ]; do
    sleep 0.2
done
ask="--endpoint=$(cat "$OUT/url") --endpoint_model=truth"

# ---- collect, remove duplicates, choose what the strong model shall caption ----
$curate collect --in="$WEB" --out="$OUT/collected"
$curate dedup --in="$OUT/collected" --out="$OUT/unique"
$curate select --in="$OUT/unique" --out="$OUT/picked" --n=800 --clusters=16
for mode in caption recaption; do
    $curate annotate --in="$OUT/picked" --out="$OUT/reference_$mode" --mode=$mode $ask $toy
done

# From here on bash leaves patterns alone: our own readers fill them in.
set -f

# ---- distil a captioner, recaption everything, score and filter ----
$torchrun sft.py config/captioner.py config/toy_sft.py --parallel=ddp \
    --init_from="$OUT/start" --out_dir="$OUT/captioner" \
    --instruction.data="$OUT/reference_caption/*.tar,$OUT/reference_recaption/*.tar" \
    --instruction.steps=$(share 160) --instruction.lr_projector=4e-3
$torchrun curate.py recaption --in="$OUT/unique" --out="$OUT/captions" \
    --model="$OUT/captioner/instruction" --dtype=float32 $toy
$curate score --in="$OUT/captions" --out="$OUT/scored" $ask
$curate filter --in="$OUT/scored" --out="$OUT/final" \
    --min_richness=3 --min_alignment=3 --max_repetition=0.5

# ---- how good are the captions? ----
reference="$OUT/reference_caption"
sets="alt=$OUT/unique,reference=$reference,recaption=$OUT/captions,final=$OUT/final"
$curate report --in="$sets" --references="$reference" --out="$OUT"
set +f
$truth facts "$WEB"/*.truth.jsonl -- alt="$OUT/unique" reference="$reference" \
    recaption="$OUT/captions" recaption_not_in_reference="$OUT/captions:$reference" \
    final="$OUT/final"
set -f

# ---- does a model learn more from them? alt-text (unique) against recaptions (final) ----
$curate collect --in="${WEB}_new" --out="$OUT/new"
captions=()
for seed in $SEEDS; do
    for set in unique final; do
        run="$OUT/pretrained_${set}_$seed"
        $torchrun train.py config/toy.py --seed=$seed --stages=alignment \
            --alignment.steps=$(share 100) --init_from="${FRESH//\{seed\}/$seed}" \
            --data="$OUT/$set/*.tar" --out_dir="$run"
        if [ "$NEW_CAPTIONS" = yes ]; then
            $torchrun curate.py recaption --in="$OUT/new" --out="$run/captions" \
                --model="$run/alignment" --mode=caption --dtype=float32 $toy
            captions+=("pretrained_on_${set}_$seed=$run/captions")
        fi
        $torchrun sft.py config/toy_sft.py --seed=$seed --stages=knowledge \
            --knowledge.steps=$(share 60) --knowledge.data="${WEB}_sft/knowledge-*.tar" \
            --init_from="$run/alignment" --out_dir="$run/sft"
        $torchrun eval.py --model="$run/sft/knowledge" --data_dir="${WEB}_new" \
            --benchmarks=toy --limit=100 --out_dir="$run/eval"
    done
done
set +f
if [ "$NEW_CAPTIONS" = yes ]; then
    $truth facts "${WEB}_new"/*.truth.jsonl -- "${captions[@]}"
fi
for run in "$OUT"/pretrained_*; do
    overall='import json, sys; print(json.load(open(sys.argv[1]))["overall"])'
    echo "$run: overall $("$BIN/python" -c "$overall" "$run/eval/results.json")"
done
echo "$((SECONDS - start)) seconds; look at $OUT/report.html"
