#!/usr/bin/env bash
# A toy vision-language model from start to report: data, five stages of training, evaluation.
#
#     bash runs/demo.sh
#
# Everything lands in $DEMO. A run that was stopped goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
start=$SECONDS

BIN=${BIN:-.venv/bin}
DEMO=${DEMO:-out/demo}          # the run folders, the model, the report
SHARDS=${SHARDS:-shards/toy}    # the toy data
N=${N:-3000}                    # pictures for training
N_BENCH=${N_BENCH:-200}         # questions of each benchmark
PRETRAIN=${PRETRAIN:-}          # more flags for train.py
SFT=${SFT:-}                    # more flags for sft.py
EVAL=${EVAL:-}                  # more flags for eval.py
BLIND=${BLIND:-}                # "yes": also train a model on gray pictures, as a control

# Two processes of one thread each are faster on two cores than one process of two threads.
export OMP_NUM_THREADS=1
torchrun="$BIN/torchrun --standalone --nproc_per_node=2"

# ---- data, and the model to start from: a pretrained ViT and LLM with a fresh projector ----
assemble() {
    [ -f "$DEMO/start/config.json" ] ||
        "$BIN/python" convert.py assemble --vision=toy/vit --llm=toy/llm --out="$DEMO/start"
}
assemble &
assembling=$!
"$BIN/python" -m toy --out="$SHARDS" --n="$N" --n_bench="$N_BENCH"
wait $assembling

# ---- training ----
# The patterns of the shards are for our own reader: bash must not fill them in.
set -f
pretrain() {
    $torchrun train.py config/toy.py --init_from="$DEMO/start" \
        --data="$SHARDS/pretrain-*.tar" $PRETRAIN "$@"
}
finetune() {
    $torchrun sft.py config/toy_sft.py \
        --knowledge.data="$SHARDS/knowledge-*.tar" \
        --instruction.data="$SHARDS/instruction-*.tar" \
        --preference.data="$SHARDS/preference-*.tar" $SFT "$@"
}
pretrain --out_dir="$DEMO/pretrain"
finetune --init_from="$DEMO/pretrain/advance" --out_dir="$DEMO/sft"
controls=
if [ -n "$BLIND" ]; then
    blind="$DEMO/blind"
    pretrain --image_as=blank --out_dir="$blind/pretrain"
    finetune --image_as=blank --init_from="$blind/pretrain/advance" --out_dir="$blind/sft"
    controls="--trained_blind=$blind/sft/preference"
fi

# ---- the model, its loss, its scores ----
rm -rf "$DEMO/model"
cp -r "$DEMO/sft/preference" "$DEMO/model"
cat "$DEMO/pretrain/log.jsonl" "$DEMO/sft/log.jsonl" > "$DEMO/log.jsonl"
"$BIN/python" -c "from training.plot import plot_loss
plot_loss('$DEMO/log.jsonl', '$DEMO/loss.png')" &
plotting=$!
$torchrun eval.py --model="$DEMO/model" --untrained="$DEMO/start" --controls=True $controls \
    --data_dir="$SHARDS" --benchmarks=toy --out_dir="$DEMO" $EVAL
wait $plotting

echo "$((SECONDS - start)) seconds; look at $DEMO/report.html and $DEMO/loss.png, then try:"
echo "  $BIN/python sample.py --model=$DEMO/model --image=examples/folder/1.jpg" \
    "--prompt='Describe the image.'"
