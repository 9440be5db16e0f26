# moeplace: everything a newcomer or a contributor runs. Needs Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV := .venv
STACKS := .venv-stacks
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
TRACE := traces/tinymoe_8x32_top4.npz
HARDWARE := --topology scale-out:2x4
# of make sweep; several traces are parted by spaces, names by commas
TRACES ?= $(TRACE)
SOLVERS ?= linear,eplb,auto
TOPOLOGIES ?= scale-up:8,scale-out:2x4,torus:2x2x2
SEEDS ?= 3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-stacks check format bench bench-all sweep lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## create .venv with pinned dependencies

$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) --version) is too old: moeplace needs Python 3.11 or newer (make PYTHON=python3.12)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY) ## place the experts of a small trace and judge the placement on held-out requests
	@mkdir -p out
	$(BIN)/moeplace solve $(TRACE) $(HARDWARE) --fit half:0 --verbose --output out/moeplace.json
	$(BIN)/moeplace solve $(TRACE) $(HARDWARE) --fit half:0 --solver eplb --quiet --output out/eplb.json
	$(BIN)/moeplace score $(TRACE) linear out/eplb.json out/moeplace.json $(HARDWARE) --test half:0

test: $(READY) ## run the tests
	$(PYTEST)

test-all: $(READY) ## run the tests, slow ones too
	$(PYTEST) -m ''

test-stacks: ## run exports in SGLang's own loader, from its wheel (installs PyTorch in .venv-stacks)
	$(PYTHON) -m venv $(STACKS)
	$(STACKS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,torch]'
	$(STACKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sglang==0.5.23
	$(STACKS)/bin/python -m pytest tests/test_stacks_real.py tests/test_stacks.py tests/test_readers_sglang.py

check: $(READY) ## format, lint, types, layers, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## measure speed, memory and quality against the targets, seed 0
	$(BIN)/python -m benchmarks --seeds 1

bench-all: $(READY) ## the same for ten seeds
	$(BIN)/python -m benchmarks --seeds 10

sweep: $(READY) ## compare TRACES= SOLVERS= TOPOLOGIES= SEEDS= (JOBS= CLUSTER= OPTIONS=); goes on where it was
	$(BIN)/moeplace compare $(TRACES) --solvers $(SOLVERS) --topologies $(TOPOLOGIES) --seeds $(SEEDS) --verbose \
	  --results benchmarks/results $(if $(CLUSTER),--cluster $(CLUSTER),--jobs $(JOBS)) $(OPTIONS)

lock: $(READY) ## renew .ci/constraints.txt from what is installed
	{ sed -n 1p .ci/constraints.txt; $(BIN)/python -m pip freeze --exclude-editable; } > .ci/constraints.new
	mv .ci/constraints.new .ci/constraints.txt

clean: ## remove the environment and everything made here
	rm -rf $(VENV) $(STACKS) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
