# make demo       a fresh clone -> a pretrained, fine-tuned and evaluated toy VLM in out/demo, under three minutes on two cores
# make test       everything the README promises, checked; make lint, make toy-bases, make bench, make gpu: see below
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# two processes of one thread each, as a two-GPU machine would do it: on two cores faster than one process of two threads
RUN    := $(BIN)/torchrun --standalone --nproc_per_node=2
DEMO   := out/demo
SHARDS := shards/toy
N      := 3000

.PHONY: demo demo-long five-stages scaling-demo curate-demo captions-chain test test-nightly lint toy-bases bench gpu
.DELETE_ON_ERROR:

$(VENV)/run.done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt matplotlib==3.11.2
	touch $@

$(VENV)/dev.done: requirements-dev.txt $(VENV)/run.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/run.done
	@$(MAKE) --no-print-directory five-stages

# the same for longer, and beside it a model trained blind, on gray tiles, for as many steps
demo-long: $(VENV)/run.done
	@$(MAKE) --no-print-directory five-stages DEMO=out/demo-long SHARDS=shards/toy_long N=6000 BENCH=--n_bench=600 BLIND=yes \
	    PRETRAIN="--tokens_per_pack=640 --alignment.steps=200 --advance.steps=250" \
	    SFT="--tokens_per_pack=800 --knowledge.steps=460 --instruction.steps=690 --preference.steps=200"

five-stages:
	@start=$$SECONDS; set -e; \
	[ -f $(DEMO)/start/config.json ] || $(BIN)/python convert.py assemble --vision=toy/vit --llm=toy/llm --out=$(DEMO)/start & \
	$(BIN)/python -m toy --out=$(SHARDS) --n=$(N) $(BENCH); \
	wait $$!; \
	pretrain="$(RUN) train.py config/toy.py --init_from=$(DEMO)/start --data=$(SHARDS)/pretrain-*.tar $(PRETRAIN)"; \
	sft="$(RUN) sft.py config/toy_sft.py $(SFT)"; \
	for stage in knowledge instruction preference; do sft="$$sft --$$stage.data=$(SHARDS)/$$stage-*.tar"; done; \
	set -f; export OMP_NUM_THREADS=1; \
	$$pretrain --out_dir=$(DEMO)/pretrain; \
	$$sft --init_from=$(DEMO)/pretrain/advance --out_dir=$(DEMO)/sft; \
	if [ "$(BLIND)" ]; then \
	    $$pretrain --image_as=blank --out_dir=$(DEMO)/blind/pretrain; \
	    $$sft --image_as=blank --init_from=$(DEMO)/blind/pretrain/advance --out_dir=$(DEMO)/blind/sft; fi; \
	rm -rf $(DEMO)/model; cp -r $(DEMO)/sft/preference $(DEMO)/model; \
	cat $(DEMO)/pretrain/log.jsonl $(DEMO)/sft/log.jsonl > $(DEMO)/log.jsonl; \
	$(BIN)/python -c "import common; common.plot_loss('$(DEMO)/log.jsonl', '$(DEMO)/loss.png')" & \
	$(RUN) eval.py --model=$(DEMO)/model --untrained=$(DEMO)/start --controls=True $(if $(BLIND),--trained_blind=$(DEMO)/blind/sft/preference) \
	    --data_dir=$(SHARDS) --benchmarks=toy --out_dir=$(DEMO) $(EVAL); \
	wait $$!; \
	echo "$$((SECONDS - start)) seconds; look at $(DEMO)/report.html and $(DEMO)/loss.png, then try:"; \
	echo "  $(BIN)/python sample.py --model=$(DEMO)/model --image=examples/folder/1.jpg --prompt='Describe the image.'"

# poor alt-text -> a filtered recaption set, then models pretrained on either: everything under out/curate. The endpoint
# that writes references and judges is tests/toy_endpoint.py: it knows the truth, fails 5 % and answers malformed 5 %
CURATE := out/curate
WEB    := shards/toy_web
N_WEB  := 2400
SEEDS  := 1 2

# the second claim in miniature: alignment and advance of 10 to 160 steps each, then the same fine-tuning, twice
scaling-demo: $(VENV)/run.done
	$(BIN)/python -m toy --out=$(SHARDS) --n=$(N)
	[ -f out/scaling/start/config.json ] || $(BIN)/python convert.py assemble --vision=toy/vit --llm=toy/llm --out=out/scaling/start
	OMP_NUM_THREADS=1 $(BIN)/python -m runs.scaling plan --run=True --processes=2 --steps=10,20,40,80,160 --seeds=1,2 \
	    --train="config/toy.py --init_from=out/scaling/start --data='$(SHARDS)/pretrain-*.tar'" \
	    --sft="config/toy_sft.py --stages=knowledge --knowledge.steps=60 --knowledge.data='$(SHARDS)/knowledge-*.tar'" --model=sft/knowledge --eval="--data_dir=$(SHARDS) --benchmarks=toy"
	$(BIN)/python -m runs.scaling fit
	$(BIN)/python -m runs.scaling plot

curate-demo: $(VENV)/run.done
	@$(MAKE) --no-print-directory captions-chain

captions-chain:
	@start=$$SECONDS; set -e; export OMP_NUM_THREADS=1; at=$(CURATE); mkdir -p $$at; \
	curate() { $(BIN)/python curate.py "$$@"; }; truth="$(BIN)/python tests/toy_endpoint.py"; \
	$(BIN)/python -m toy --out=$(WEB) --n=$(N_WEB) --parts=web; \
	$(BIN)/python -m toy --out=$(WEB)_new --n=200 --seed=9 --parts=web,bench; \
	$(BIN)/python -m toy --out=$(WEB)_sft --n=800 --seed=8 --parts=knowledge; \
	[ -f $$at/start/config.json ] || $(BIN)/python convert.py assemble --vision=toy/vit --llm=toy/llm --out=$$at/start; \
	rm -f $$at/url; $$truth serve $$at/url $(WEB)/*.truth.jsonl & trap "kill $$!" EXIT; until [ -s $$at/url ]; do sleep 0.2; done; \
	ask="--endpoint=$$(cat $$at/url) --endpoint_model=truth"; toy="--prompts=curation/prompts/toy --max_new_tokens=160"; \
	curate collect --in=$(WEB) --out=$$at/collected; \
	curate dedup --in=$$at/collected --out=$$at/unique; \
	curate select --in=$$at/unique --out=$$at/picked --n=800 --clusters=16; \
	for mode in caption recaption; do curate annotate --in=$$at/picked --out=$$at/reference_$$mode --mode=$$mode $$ask $$toy; done; \
	set -f; $(RUN) sft.py config/captioner.py config/toy_sft.py --parallel=ddp --init_from=$$at/start --out_dir=$$at/captioner \
	    --instruction.data=$$at/reference_caption/*.tar,$$at/reference_recaption/*.tar --instruction.steps=160 \
	    --instruction.lr_projector=4e-3; set +f; \
	$(RUN) curate.py recaption --in=$$at/unique --out=$$at/captions --model=$$at/captioner/instruction --dtype=float32 $$toy; \
	curate score --in=$$at/captions --out=$$at/scored $$ask; \
	curate filter --in=$$at/scored --out=$$at/final --min_richness=3 --min_alignment=3 --max_repetition=0.5; \
	curate report --in=alt=$$at/unique,reference=$$at/reference_caption,recaption=$$at/captions,final=$$at/final \
	    --references=$$at/reference_caption --out=$$at; \
	$$truth facts $(WEB)/*.truth.jsonl -- alt=$$at/unique reference=$$at/reference_caption recaption=$$at/captions \
	    recaption_not_in_reference=$$at/captions:$$at/reference_caption final=$$at/final; \
	curate collect --in=$(WEB)_new --out=$$at/new; \
	for seed in $(SEEDS); do for set in unique final; do run=$$at/pretrained_$${set}_$$seed; set -f; \
	    $(RUN) train.py config/toy.py --seed=$$seed --stages=alignment --alignment.steps=100 --init_from=$$at/start \
	        --data=$$at/$$set/*.tar --out_dir=$$run; \
	    $(RUN) curate.py recaption --in=$$at/new --out=$$run/captions --model=$$run/alignment --mode=caption --dtype=float32 $$toy; \
	    $(RUN) sft.py config/toy_sft.py --seed=$$seed --stages=knowledge --knowledge.steps=60 --init_from=$$run/alignment \
	        --knowledge.data=$(WEB)_sft/knowledge-*.tar --out_dir=$$run/sft; set +f; \
	    $(RUN) eval.py --model=$$run/sft/knowledge --data_dir=$(WEB)_new --benchmarks=toy --limit=100 --out_dir=$$run/eval; \
	done; done; \
	$$truth facts $(WEB)_new/*.truth.jsonl -- $(foreach s,$(SEEDS),pretrained_on_alt_$(s)=$$at/pretrained_unique_$(s)/captions \
	    pretrained_on_final_$(s)=$$at/pretrained_final_$(s)/captions); \
	for run in $$at/pretrained_*; do echo "$$run: overall $$($(BIN)/python -c "import json; print(json.load(open('$$run/eval/results.json'))['overall'])")"; done; \
	echo "$$((SECONDS - start)) seconds; look at $$at/report.html"

test: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not nightly"

test-nightly: $(VENV)/dev.done
	$(BIN)/python -m pytest

lint: $(VENV)/dev.done
	$(BIN)/python -m ruff check .

# the CPU rows of the README's section Speed, half an hour
bench: $(VENV)/dev.done
	for part in vs-hf attn ce train stages decode; do OMP_NUM_THREADS=2 $(BIN)/python -m bench $$part --device=cpu; done

# where there is a GPU: correctness, then every row that needs one, each part cut off so that all end within ten minutes
# (what was measured by then is reported, and kept in $OUT or out/gpu); without a network: make gpu BIN=FOLDER_OF_PYTHON
gpu:
	mkdir -p $${OUT:-out/gpu}
	for part in "90 -m pytest -m gpu tests" "90 -m bench attn --rounds=5" "30 -m bench ce --rounds=5" \
	    "130 -m bench train --rounds=5" "40 -m bench stages --rounds=5" "120 -m bench vs-hf --rounds=5 --rows=2b" \
	    "30 -m bench decode --rounds=5" "40 -m bench warmup"; do set -- $$part; seconds=$$1; shift; \
	    timeout $$seconds $(BIN)/python "$$@" 2>&1 | tee -a $${OUT:-out/gpu}/rows.txt; done

# parts like those in config/toy_vit and config/toy_llm, from scratch, half an hour each (LOG.md: how far the first went)
toy-bases: $(VENV)/run.done
	$(BIN)/python -m toy --out=shards/toy_llm --n=230000 --seed=102 --parts=text
	OMP_NUM_THREADS=1 $(RUN) train.py config/toy_llm.py
	$(BIN)/python -m toy --out=shards/toy_llm_noise --n=150000 --seed=103 --parts=text
	OMP_NUM_THREADS=1 $(RUN) train.py config/toy_llm.py config/toy_llm_noise.py
	$(BIN)/python -m toy --out=shards/toy_bench --parts=bench
	$(BIN)/python eval.py --image_as=words --model=out/toy_llm_noise/base --data_dir=shards/toy_bench --benchmarks=toy --out_dir=out/toy_llm_noise/eval
	$(BIN)/python -m toy --out=shards/toy_vit --n=40000 --seed=101 --parts=pretrain
	OMP_NUM_THREADS=1 $(RUN) train.py config/toy_vit.py
	$(BIN)/python convert.py assemble --vision=out/toy_vit/base --llm=out/toy_llm_noise/base --out=out/toy_vit_noise/start
	$(BIN)/python -m toy --out=shards/toy_vit_noise --n=24000 --seed=101 --parts=drill
	OMP_NUM_THREADS=1 $(RUN) train.py config/toy_vit.py config/toy_vit_noise.py
