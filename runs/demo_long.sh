#!/usr/bin/env bash
# The demo with 1,800 steps instead of 730 and 600 questions for each benchmark. A second model is
# trained for as many steps on gray pictures: what it scores can be guessed from the words alone.
set -euo pipefail

export DEMO=out/demo-long
export SHARDS=shards/toy_long
export N=6000
export N_BENCH=600
export BLIND=yes
export PRETRAIN="--tokens_per_pack=640 --alignment.steps=200 --advance.steps=250"
export SFT="--tokens_per_pack=800 --knowledge.steps=460 --instruction.steps=690"
export SFT="$SFT --preference.steps=200"
exec bash "$(dirname "$0")/demo.sh"
