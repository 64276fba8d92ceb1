# make generate PROMPT="a red star left of a blue ring"    draw a picture on the CPU, and print its path
# make test                                                run the tests
#
# Both make .venv first. TORCH chooses torch's build, as in make test TORCH="torch==2.13.0 --index-url ...".

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
TORCH ?= torch==2.13.0
PROMPT ?= a red star left of a blue ring
ARGS ?=
# Processes of the tests. Each takes one thread: threads of two that share cores wait for each other.
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
# The first interpreter of at least 3.11; PYTHON=... chooses another.
PYTHON ?= $(shell for p in python3 python python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: help generate test lint format types wheel results doctor clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python of at least 3.11 here; give one with make PYTHON=..." >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version) and $(TORCH); the first time takes a few minutes" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" >&2
	@$(BIN)/python -m pip install --quiet $(TORCH) >&2
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation -e . >&2
	@touch $@

$(DEV_STAMP): $(STAMP)
	@echo "installing the tools for tests, lint and types" >&2
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[dev]" >&2
	@touch $@

generate: $(STAMP)  ## draw PROMPT="..." with the embedded model; ARGS="--method softpag" for more options
	@$(BIN)/diffctrl generate $(ARGS) -- "$$PROMPT"
generate: export PROMPT := $(PROMPT)

doctor: $(STAMP)  ## which kernels and devices work here, and why not
	@$(BIN)/diffctrl doctor

test: $(DEV_STAMP)  ## run the tests: offline, on the CPU
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: $(DEV_STAMP)  ## check the style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(DEV_STAMP)  ## correct the style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(DEV_STAMP)  ## check the types
	@$(BIN)/python -m diffctrl.scripts.typecheck

wheel: $(DEV_STAMP)  ## build dist/*.whl
	@rm -rf dist build/lib build/bdist.*
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null
	@ls dist/*.whl

results: $(STAMP)  ## write docs/results/README.md from the results beside it
	@$(BIN)/python -m diffctrl.scripts.results_index

clean:  ## remove what the commands above made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
