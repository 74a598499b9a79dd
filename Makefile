# `make example` and `make test` set up all they need in a clean clone; `make` alone lists the targets.
#
# Variables, given as `make example TORCH_INDEX=...` or in the environment:
#   PYTHON        the Python (3.11 to 3.13) that the virtual environment is made of
#   TORCH_INDEX   package index for torch; empty: pip's own, which on Linux gives the CUDA build (gigabytes).
#                 CPU only: https://download.pytorch.org/whl/cpu    another CUDA: https://download.pytorch.org/whl/cu126
#   CORES         CPU cores for the example
#   WORKERS       test processes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX ?=
CORES ?= all
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' envs/lock.txt)
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
PIP := -m pip --disable-pip-version-check install --quiet
SNAKE_FILES := workflow/Snakefile workflow/rules
SCHEMAS := workflow/schemas
# The tools run as programs of the environment, whatever is active in the shell.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help venv example test test-fast lint format lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

venv: $(STAMP) ## make the virtual environment .venv with the exact versions of envs/lock.txt

$(STAMP): pyproject.toml envs/lock.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"error: Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; give another one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) $(TORCH_FROM) $(TORCH)
	$(BIN)/python $(PIP) --requirement envs/lock.txt
	$(BIN)/python $(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

example: $(STAMP) ## make the example data, train small models, write the tables and a report below example-run/
	snakemake --profile example --cores $(CORES) all
	snakemake --profile example --cores $(CORES) --report report.html

test: $(STAMP) ## run all tests
	OMP_NUM_THREADS=1 python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder

test-fast: $(STAMP) ## run the fast unit tests
	OMP_NUM_THREADS=1 python -m pytest --numprocesses $(WORKERS) -m 'unit and not slow' tests/unit

lint: $(STAMP) ## run the checks of the code alone (they are part of the tests)
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check $(SNAKE_FILES)
	codespell
	snakemake --lint

format: $(STAMP) ## format Python and Snakemake files, write the schemas and the tables of config/README.md
	python -m celldetr.config.workflow $(SCHEMAS)
	PYTHONPATH=scripts python tests/helpers/settings_tables.py
	ruff check --fix .
	ruff format .
	snakefmt $(SNAKE_FILES)

lock: ## write envs/lock.txt and the conda files anew: KEEP=1 (default) changes only what pyproject.toml asks for, KEEP= takes the newest
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python $(PIP) $(TORCH_FROM) $(TORCH)
	.venv-lock/bin/python $(PIP) $(if $(KEEP),--constraint envs/lock.txt) --editable '.[workflow,dev]'
	sed -n '/^#/p' envs/lock.txt > .venv-lock/lock.txt
	.venv-lock/bin/python -m pip --disable-pip-version-check freeze --all --exclude-editable \
	  | grep --invert-match --ignore-case --extended-regexp '^(pip|wheel|celldetr|nvidia-[^=]*|cuda-[^=]*)(=| @)' \
	  | sed 's/+[a-z0-9.]*$$//; s/^triton==.*/&; sys_platform == "linux"/' >> .venv-lock/lock.txt
	mv .venv-lock/lock.txt envs/lock.txt && .venv-lock/bin/python envs/pin.py && rm -rf .venv-lock
KEEP ?= 1

clean: ## remove the environment, the caches and the example's results (never results/)
	rm -rf $(VENV) .venv-lock example-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf scripts/celldetr.egg-info
