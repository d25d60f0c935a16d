# make demo       a fresh clone -> a pretrained, fine-tuned and evaluated toy VLM in out/demo, seven minutes on two cores
# make test       everything the README promises, checked; make lint, make toy-bases: see below
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# two processes of one thread each, as a two-GPU machine would do it: on two cores faster than one process of two threads
RUN    := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2
DEMO   := out/demo

.PHONY: demo test test-nightly lint toy-bases
.DELETE_ON_ERROR:

$(VENV)/run.done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt matplotlib==3.11.2
	touch $@

$(VENV)/dev.done: requirements-dev.txt $(VENV)/run.done
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/run.done
	@start=$$SECONDS; set -e; \
	$(BIN)/python toy.py --out=shards/toy --n=3000; \
	[ -f $(DEMO)/start/config.json ] || $(BIN)/python convert.py assemble --vision=config/toy_vit --llm=config/toy_llm --out=$(DEMO)/start; \
	$(RUN) train.py config/toy.py --init_from=$(DEMO)/start --out_dir=$(DEMO)/pretrain; \
	$(RUN) sft.py config/toy_sft.py --init_from=$(DEMO)/pretrain/advance --out_dir=$(DEMO)/sft; \
	rm -rf $(DEMO)/model; cp -r $(DEMO)/sft/preference $(DEMO)/model; \
	cat $(DEMO)/pretrain/log.jsonl $(DEMO)/sft/log.jsonl > $(DEMO)/log.jsonl; \
	$(BIN)/python common.py plot $(DEMO)/log.jsonl $(DEMO)/loss.png; \
	$(RUN) eval.py --model=$(DEMO)/model --untrained=$(DEMO)/start --controls=True --data_dir=shards/toy --benchmarks=toy --out_dir=$(DEMO); \
	echo "demo: $$((SECONDS - start)) seconds; look at $(DEMO)/report.html and $(DEMO)/loss.png, then try:"; \
	echo "  $(BIN)/python sample.py --model=$(DEMO)/model --image=YOUR.jpg --prompt='Describe the image.'"

test: $(VENV)/dev.done
	$(BIN)/python -m pytest -m "not gpu and not nightly"

test-nightly: $(VENV)/dev.done
	$(BIN)/python -m pytest

lint: $(VENV)/dev.done
	$(BIN)/python -m ruff check .

# how the two pretrained parts of the toy world in config/toy_vit and config/toy_llm were made (about half an hour each at most)
toy-bases: $(VENV)/run.done
	$(BIN)/python toy.py --out=shards/toy_vit --n=16000 --seed=101 --parts=pretrain
	OMP_NUM_THREADS=1 $(BIN)/python train.py config/toy_vit.py
	$(BIN)/python toy.py --out=shards/toy_llm --n=160000 --seed=102 --parts=text
	$(RUN) train.py config/toy_llm.py
	$(BIN)/python eval.py --image_as=words --model=out/toy_llm/base --data_dir=shards/toy --benchmarks=toy --out_dir=out/toy_llm/eval
