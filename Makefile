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

.PHONY: demo demo-long five-stages test test-nightly lint toy-bases bench gpu
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
	@$(MAKE) --no-print-directory five-stages DEMO=out/demo-long SHARDS=shards/toy_long N=6000 BLIND=yes \
	    PRETRAIN="--alignment.steps=400 --advance.steps=700" \
	    SFT="--knowledge.steps=500 --instruction.steps=500 --preference.steps=300"

five-stages:
	@start=$$SECONDS; set -e; \
	$(BIN)/python toy.py --out=$(SHARDS) --n=$(N); \
	[ -f $(DEMO)/start/config.json ] || $(BIN)/python convert.py assemble --vision=config/toy_vit --llm=config/toy_llm --out=$(DEMO)/start; \
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
	$(BIN)/python common.py plot $(DEMO)/log.jsonl $(DEMO)/loss.png; \
	$(RUN) eval.py --model=$(DEMO)/model --untrained=$(DEMO)/start --controls=True $(if $(BLIND),--trained_blind=$(DEMO)/blind/sft/preference) \
	    --data_dir=$(SHARDS) --benchmarks=toy --out_dir=$(DEMO) $(EVAL); \
	echo "$$((SECONDS - start)) seconds; look at $(DEMO)/report.html and $(DEMO)/loss.png, then try:"; \
	echo "  $(BIN)/python sample.py --model=$(DEMO)/model --image=YOUR.jpg --prompt='Describe the image.'"

test: $(VENV)/dev.done
	$(BIN)/python -m pytest -m "not gpu and not nightly"

test-nightly: $(VENV)/dev.done
	$(BIN)/python -m pytest

lint: $(VENV)/dev.done
	$(BIN)/python -m ruff check .

# the CPU rows of the README's section Speed, half an hour
bench: $(VENV)/dev.done
	for part in vs-hf attn ce train stages decode; do OMP_NUM_THREADS=2 $(BIN)/python bench.py $$part --device=cpu; done

# where there is a GPU: correctness, then every row that needs one, each part cut off so that all end within ten minutes
# (what was measured by then is reported); without a network: make gpu BIN=FOLDER_OF_PYTHON
gpu:
	-timeout 100 $(BIN)/python -m pytest -m gpu tests
	-timeout 100 $(BIN)/python bench.py attn --rounds=5
	-timeout 40 $(BIN)/python bench.py ce --rounds=5
	-timeout 140 $(BIN)/python bench.py train --rounds=5
	-timeout 50 $(BIN)/python bench.py stages --rounds=5
	-timeout 90 $(BIN)/python bench.py vs-hf --rounds=5 --compiled=False
	-timeout 40 $(BIN)/python bench.py decode --rounds=5
	-timeout 40 $(BIN)/python bench.py warmup

# how the two pretrained parts of the toy world in config/toy_vit and config/toy_llm were made: under half an hour each
toy-bases: $(VENV)/run.done
	$(BIN)/python toy.py --out=shards/toy_llm --n=230000 --seed=102 --parts=text
	OMP_NUM_THREADS=1 $(RUN) train.py config/toy_llm.py
	$(BIN)/python toy.py --out=shards/toy_llm_noise --n=150000 --seed=103 --parts=text
	OMP_NUM_THREADS=1 $(RUN) train.py config/toy_llm.py config/toy_llm_noise.py
	$(BIN)/python toy.py --out=shards/toy_bench --parts=bench
	$(BIN)/python eval.py --image_as=words --model=out/toy_llm_noise/base --data_dir=shards/toy_bench --benchmarks=toy --out_dir=out/toy_llm_noise/eval
	$(BIN)/python toy.py --out=shards/toy_vit --n=40000 --seed=101 --parts=pretrain
	OMP_NUM_THREADS=1 $(RUN) train.py config/toy_vit.py
	$(BIN)/python convert.py assemble --vision=out/toy_vit/base --llm=out/toy_llm_noise/base --out=out/toy_vit_noise/start
	$(BIN)/python toy.py --out=shards/toy_vit_noise --n=24000 --seed=101 --parts=pretrain
	OMP_NUM_THREADS=1 $(RUN) train.py config/toy_vit.py config/toy_vit_noise.py
