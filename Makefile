# `make example` and `make test` set up all they need in a clean clone; `make` alone lists the targets.
#
# Variables, given as `make example TORCH_INDEX=...` or in the environment:
#   PYTHON        the Python (3.11 to 3.13) that the virtual environment is made of
#   TORCH_INDEX   package index for torch; empty: pip's own, which on Linux gives the CUDA build (gigabytes).
#                 CPU only: https://download.pytorch.org/whl/cpu    another CUDA: https://download.pytorch.org/whl/cu126
#   VENV          environment that runs the example and the tests: .venv-baselines where `make baselines` made it, else .venv
#   CORES         CPU cores for the example
#   WORKERS       test processes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH_INDEX ?=
CORES ?= all
WORKERS ?= 2

BASELINES := .venv-baselines
VENV := $(if $(wildcard $(BASELINES)/.installed),$(BASELINES),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch, and torchvision where it is locked, come first and from the same index: they must be builds of one kind
TORCH = $(shell grep -hE '^torch(vision)?==' $(1))
TORCH_FROM := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
PIP := -m pip --disable-pip-version-check install --quiet
SNAKE_FILES := workflow/Snakefile workflow/rules
SCHEMAS := workflow/schemas
# The tools run as programs of the environment, whatever is active in the shell.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help venv baselines example test test-fast test-baselines lint format lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

venv: .venv/.installed ## make the virtual environment .venv with the exact versions of envs/lock.txt

baselines: $(BASELINES)/.installed ## make .venv-baselines: .venv and what the other systems of Table 1 need; all targets use it then

.venv/.installed: LOCKS := envs/lock.txt
$(BASELINES)/.installed: LOCKS := envs/lock-baselines.txt envs/lock.txt
$(BASELINES)/.installed: envs/lock-baselines.txt

# A package that two files of LOCKS hold has the version of the first.
.venv/.installed $(BASELINES)/.installed: pyproject.toml envs/lock.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"error: Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}; give another one: make PYTHON=python3.12 ...")'
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	awk -F == 'NR == FNR { own[$$1] } NR == FNR || !($$1 in own)' $(LOCKS) > $(@D)/lock.txt
	$(@D)/bin/python $(PIP) $(TORCH_FROM) $$(grep -E '^torch(vision)?==' $(@D)/lock.txt)
	$(@D)/bin/python $(PIP) --requirement $(@D)/lock.txt
	$(@D)/bin/python $(PIP) --no-deps --no-build-isolation --editable .
	@! grep -q ^torchvision== $(@D)/lock.txt || $(@D)/bin/python -c 'import torch, torchvision; \
	  torchvision.ops.nms(torch.tensor([[0.0, 0, 2, 2], [1.0, 0, 2, 2]]), torch.ones(2), 0.5)' 2>&1 | tail -n 1 || \
	  { echo "error: torchvision does not work with this torch: they are not builds of one kind. Name an index that has both" \
	  "and start again: rm -rf $(@D); make baselines TORCH_INDEX=https://download.pytorch.org/whl/cpu"; exit 1; } >&2
	@touch $@

example: $(STAMP) ## make the example data, train small models, write the tables and a report below example-run/
	snakemake --profile example --cores $(CORES) all
	snakemake --profile example --cores $(CORES) --report report.html

test: $(STAMP) ## run all tests
	OMP_NUM_THREADS=1 python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder --max-worker-restart 0

test-baselines: $(BASELINES)/.installed ## make .venv-baselines and run the tests of what it is for
	OMP_NUM_THREADS=1 $(BASELINES)/bin/python -m pytest --numprocesses $(WORKERS) tests/baselines

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

LOCK := .venv-lock/bin/python
FREEZE := $(LOCK) -m pip --disable-pip-version-check freeze --all --exclude-editable \
	  | grep --invert-match --ignore-case --extended-regexp '^(pip|wheel|celldetr|nvidia-[^=]*|cuda-[^=]*)(=| @)' \
	  | sed 's/+[a-z0-9.]*$$//; s/^triton==.*/&; sys_platform == "linux"/'
KEEP ?= 1

lock: ## write the lock and conda files of envs/ anew: KEEP=1 (default) changes only what pyproject.toml asks for, KEEP= takes the newest
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	$(LOCK) $(PIP) $(TORCH_FROM) $(call TORCH,envs/lock.txt)
	$(LOCK) $(PIP) $(if $(KEEP),--constraint envs/lock.txt) --editable '.[workflow,dev]'
	{ sed -n '/^#/p' envs/lock.txt; $(FREEZE); } > .venv-lock/lock.txt && mv .venv-lock/lock.txt envs/lock.txt
	sed '/^torch==/d; /^triton==/d' envs/lock.txt > .venv-lock/shared.txt
	$(LOCK) $(PIP) $(TORCH_FROM) $(call TORCH,envs/lock-baselines.txt)
	$(LOCK) $(PIP) --constraint .venv-lock/shared.txt $(if $(KEEP),--constraint envs/lock-baselines.txt) --editable '.[baselines]'
	{ sed -n '/^#/p' envs/lock-baselines.txt; $(FREEZE) | grep -vxFf envs/lock.txt; } > .venv-lock/lock.txt
	mv .venv-lock/lock.txt envs/lock-baselines.txt && $(LOCK) envs/pin.py && rm -rf .venv-lock

clean: ## remove the environments, the caches and the example's results (never results/)
	rm -rf .venv $(BASELINES) .venv-lock example-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf scripts/celldetr.egg-info
