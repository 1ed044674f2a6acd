PYTHON ?= python3
VENV := .venv
OUT ?= gpu_results
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-ci test-all gpu lint format

# The environment is rebuilt only when what it is made from changes.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED)
	$(VENV)/bin/python examples/train_math.py

test: $(INSTALLED) lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not ci and not slow and not gpu and not multi_gpu"

# What is too long for `test`. Launches of two processes have the cores for themselves.
test-ci: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "ci and not slow and not gpu and not multi_gpu" --ignore tests/distributed
	$(VENV)/bin/python -m pytest -m "ci and not slow and not gpu and not multi_gpu" tests/distributed

# Everything, GPU tests too where there is one. The kernels need Triton, which the CUDA builds of PyTorch bring along.
test-all: $(INSTALLED) lint
	$(VENV)/bin/python -c "import triton" 2>/dev/null || $(VENV)/bin/python -m pip install --quiet triton==3.9.0
	$(VENV)/bin/python -m pytest

# What a GPU must show, in at most 9 minutes, into the folder OUT. No environment is made: PYTHON needs PyTorch and the
# dependencies of this package.
gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
