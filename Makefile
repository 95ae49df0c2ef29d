# `make demo` and `make test` set everything up themselves; nothing but Python 3.11 and make is needed.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-slow lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlvr needs Python >= 3.11, found " + sys.version.split()[0] + "; run: make PYTHON=python3.11 ...")'
	@echo "Setting up $(VENV) (once, one to three minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,gguf,math]'
	@touch $@

setup: $(READY) ## create .venv with the pinned versions

demo: $(READY) ## train the embedded policy twice, GRPO and a schedule, and compare (at most 5 minutes)
	@$(BIN)/python experiments/demo/run.py

test: $(READY) ## the test suite
	@$(BIN)/python -m pytest -q

test-slow: $(READY) ## the tests that train for minutes
	@$(BIN)/python -m pytest -q -m slow

lint: $(READY) ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## let ruff fix and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv, caches and outputs
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache outputs multirun
