# Every target builds the project's own .venv first, once, and again when its dependencies change.

PYTHON ?= python3
TEST_WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := src tests examples scripts

# Tests are repeatable and need no network: one thread per worker, no calls to the Hugging Face hub, and products of
# matrices that do not depend on where in memory the matrices lie (MKL_CBWR; on some processors they do).
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MKL_CBWR=AUTO,STRICT TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

.DEFAULT_GOAL := help
.PHONY: help install demo test check format lint types build clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else \
	  "mnemon needs Python 3.11 or 3.12, $(PYTHON) is %d.%d; try: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(STAMP) ## build .venv with the pinned dependencies

demo: $(STAMP) ## train, evaluate and compare on this machine; writes runs/demo/
	$(BIN)/mnemon demo --overwrite

test: $(STAMP) ## the whole test suite
	$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_WORKERS) $(ARGS)

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

lint: $(STAMP) ## format and lint, changing nothing
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

check: lint types test ## everything a change must pass

build: $(STAMP) ## wheel and sdist in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove .venv, caches and built files (runs/ stays)
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
