# `make` lists the targets. Everything is installed into .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Python 3.11 is the tested one.
PYTHON ?= $(shell command -v python3.11 || echo python3)
# Installed first and by version: a range would choose a newer torch, with gigabytes of CUDA.
# For a GPU, or a CPU wheel of another index: make TORCH='torch==2.13.0 --index-url URL'.
TORCH ?= torch==2.13.0
# Of `make test`: ARGS='tests/unit -k recipe'.
ARGS ?=
# The other backbone: what the newest Megatron-core, which has no wheel for Python 3.11, is tested with.
PYTHON_LATEST ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) python3.12)
MEGATRON_LATEST ?= megatron-core>=0.19,<0.20

BIN := .venv/bin
READY := .venv/installed
LATEST := .venv-latest
SAMPLE := data/sample
RUN := runs/tiny
CODE := megamoe launch model_configs data_prep kernels benchmarks tests
TOKENIZE := $(BIN)/megamoe data tokenize --tokenizer data/tokenizer -o $(SAMPLE).partial --heldout 0.03 --fim

.PHONY: help setup train data test test-latest test-gpu parity mutations gpu-check bench-overhead check lint types imports format plans clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## create .venv and install everything

train: $(READY) $(SAMPLE)/manifest.json ## train a small VAETKI through its three stages, here, in minutes
	@if tail -n 1 $(RUN)/events.jsonl 2>/dev/null | grep -q '"run_done"'; then \
	  echo '$(RUN) is finished; to train it anew: rm -r $(RUN) && make train'; \
	fi
	@if [ -f $(RUN)/plan.json ]; then \
	  $(BIN)/megamoe run $(RUN); \
	else \
	  $(BIN)/megamoe run vaetki_7b_a1b --scale tiny --nproc 2 --run-dir $(RUN) \
	    --set general.layout.ep=2 --set long_context.layout.pp=2; \
	fi

data: $(SAMPLE)/manifest.json ## tokenise the sample corpus into data/sample

# One thread a process: tests start up to 16 of them, and sums do not depend on how many cores there are.
test: $(READY) ## run the test suite; ARGS='tests/unit -k recipe' for a part of it
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-latest: $(LATEST)/installed ## the test suite on Python 3.12 and the newest Megatron-core
	OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest $(ARGS)

test-gpu: $(READY) ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

parity: $(READY) ## compare every recipe in 13 layouts and more with one process, tensor by tensor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m parity $(ARGS)

mutations: $(READY) ## plant twenty-one known mistakes, one at a time: each must be found
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m mutations $(ARGS)

gpu-check: $(READY) ## measure training steps on a GPU; without: ARGS='--device cpu --scale tiny'
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

bench-overhead: $(READY) $(SAMPLE)/manifest.json ## time our training step against a bare one
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.loop_overhead --data $(SAMPLE) -o benchmarks/results/loop_overhead.json

check: lint types imports test ## everything CI checks

lint: $(READY) ## formatting, lint, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell $(CODE) docs *.md setup.py

types: $(READY) ## mypy, strict
	$(BIN)/mypy

imports: $(READY) ## who may import whom
	PYTHONPATH=.:kernels $(BIN)/lint-imports --no-cache --no-logo

format: $(READY) ## format, and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

plans: $(READY) ## renew the golden plans and the README's table of recipes
	$(BIN)/python -m tests.unit.test_plan_golden
	$(BIN)/python -m tests.unit.test_repository

clean: ## remove caches; .venv, .venv-latest, data and runs stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

$(READY): setup.py pyproject.toml
	@echo "installing into .venv with $(PYTHON); the first time takes minutes"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(LATEST)/installed: setup.py pyproject.toml
	@echo "installing into $(LATEST) with $(PYTHON_LATEST); the first time takes minutes and gigabytes"
	test -x $(LATEST)/bin/pip || $(PYTHON_LATEST) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(LATEST)/bin/pip install --quiet --disable-pip-version-check -e '.[dev]' '$(MEGATRON_LATEST)'
	touch $@

# Made beside its place and moved there whole.
$(SAMPLE)/manifest.json: | $(READY)
	rm -rf data/text data/tokenizer $(SAMPLE) $(SAMPLE).partial
	$(BIN)/megamoe data sample data/text
	$(BIN)/megamoe data tokenizer train --algorithm sentencepiece-bpe --vocab-size 4096 -o data/tokenizer data/text
	$(TOKENIZE) --source korean data/text/korean.jsonl.zst
	$(TOKENIZE) --source english data/text/english.jsonl.zst
	$(TOKENIZE) --source code --code data/text/code.jsonl.zst
	mv $(SAMPLE).partial $(SAMPLE)
