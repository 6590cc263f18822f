# `make help` lists the targets. Everything runs in .venv, which is made on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Words for the program: make quickstart ARGS="--seed 1"
ARGS ?=
# Words for pip, such as another index: make test PIP_ARGS="--extra-index-url …" picks PyTorch builds without CUDA.
PIP_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test test-slow kill-test lint format parity bench environment clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## Make .venv and install everything (once, and again when the requirements change)

# The stamp is written last: an installation cut short is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "installing into $(VENV): one to two minutes, and what your pip downloads for torch"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@# Its own pins fit nothing current (CONTRIBUTING.md), so it comes without them.
	@$(PIP) --no-deps open_flamingo einops-exts
	@touch $@

quickstart: $(STAMP) ## From nothing to a few-shot score and report.html, in minutes (ARGS="--seed 1")
	@$(BIN)/flamingo-quickstart $(ARGS)

test: environment lint ## Lint, types, and all tests but the slow ones
	$(BIN)/python -m pytest -q --durations=15 $(ARGS)

test-slow: $(STAMP) ## The tests that take minutes each
	$(BIN)/python -m pytest -q --durations=15 -m slow --timeout=3600 $(ARGS)

kill-test: $(STAMP) ## Kill 20 runs at random moments, resume them, and compare their losses bit for bit (20 minutes)
	$(BIN)/python -m train.killtest $(ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

parity: $(STAMP) ## Largest differences from the real open_flamingo, a line for each family and precision
	@$(BIN)/python benchmarks/parity.py $(ARGS)

bench: $(STAMP) ## Every benchmark, in its short form
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script --quick || exit 1; done

environment: $(STAMP)
	@$(BIN)/python -c 'import os, platform, torch, transformers; print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, {os.cpu_count()} cores, {torch.cuda.device_count()} GPUs")'

clean: ## Remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
