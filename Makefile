# make demo    trains, fine-tunes and evaluates a toy VLM in out/demo: minutes on two CPU cores
# make paper-in-miniature    tries the paper's three claims on toy pictures: docs/experiments.md
# make test    checks every promise of the README
# The other targets are below, one line each; what they do is in runs/*.sh.
PYTHON ?= python3
VENV   ?= .venv
export BIN := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo demo-long scaling-demo curate-demo paper-base paper-in-miniature toy-bases
.PHONY: test test-nightly lint bench gpu nogpu
.DELETE_ON_ERROR:

$(VENV)/run.done: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt matplotlib==3.11.2
	touch $@

$(VENV)/dev.done: requirements-dev.txt $(VENV)/run.done
	$(PIP) -r requirements-dev.txt
	touch $@

# five stages and an evaluation
demo: $(VENV)/run.done ; bash runs/demo.sh
# the same with more steps and questions, beside a model that is trained on gray pictures
demo-long: $(VENV)/run.done ; bash runs/demo_long.sh
# scores over the amount of pretraining data
scaling-demo: $(VENV)/run.done ; bash runs/scaling_demo.sh
# from poor alt-text to a filtered recaption set, then models that are pretrained on either
curate-demo: $(VENV)/run.done ; bash runs/curate_demo.sh
# the paper's three claims on the toy world, with intervals: an hour on two cores
paper-in-miniature: $(VENV)/run.done ; bash runs/paper_in_miniature.sh
# its language base, which leaves something to learn, from scratch: out/paper_base/llm
paper-base: $(VENV)/run.done ; bash runs/paper_base.sh
# the pretrained toy parts again, from scratch
toy-bases: $(VENV)/run.done ; bash runs/toy_bases.sh

test: $(VENV)/dev.done ; bash runs/test.sh -n 2 --dist loadfile -m "not gpu and not nightly"
test-nightly: $(VENV)/dev.done ; bash runs/test.sh
lint: $(VENV)/dev.done ; $(BIN)/python -m ruff check .

# speed beside other programs: on a CPU (half an hour), on a GPU (ten minutes)
bench: $(VENV)/dev.done ; bash runs/bench_cpu.sh
gpu: ; $(BIN)/python -m bench.gpu
# the CUDA path without a GPU: memory, graphs, kernels of every recipe (installs 5 GB of wheels)
nogpu: ; bash runs/nogpu.sh
