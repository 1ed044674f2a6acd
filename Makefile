PYTHON ?= python3
VENV := .venv
OUT ?= gpu_results
INSTALLED := $(VENV)/.installed
PYTEST := $(VENV)/bin/python -m pytest
ANYWHERE := not slow and not gpu and not multi_gpu

.PHONY: demo test test-ci test-all gpu versions lint format

# The environment is rebuilt only when what it is made from changes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python examples/train_math.py

# Launches of two processes have the cores for themselves.
test: $(INSTALLED) lint
	$(PYTEST) -n 2 --dist loadfile -m "not ci and not launched and $(ANYWHERE)"
	$(PYTEST) -m "launched and not ci and $(ANYWHERE)"

# What is too long for `test`
test-ci: $(INSTALLED)
	$(PYTEST) -n 2 -m "ci and not launched and $(ANYWHERE)"
	$(PYTEST) -m "ci and launched and $(ANYWHERE)"

# Everything, GPU tests too where there is one
test-all: $(INSTALLED) lint
	$(PYTEST)

# What a GPU must show, in at most 9 minutes, into the folder OUT. No environment is made: PYTHON needs PyTorch and the
# dependencies of this package.
gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT)

# The core suite in fresh environments at both ends of the supported versions; TORCH=... picks another PyTorch.
versions: $(INSTALLED)
	$(VENV)/bin/nox

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
