# Two commands: `make train` runs the main job, `make test` passes the tests. Each sets up .venv
# first, from pinned requirements; a second run reuses it. `make check` is the fast loop.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ORACLES := $(VENV)/oracles/.installed

.DELETE_ON_ERROR:
.PHONY: train check test test-all lint docs install oracles clean

train: $(INSTALLED)
	$(BIN)/nemo-megacpp demo --out runs/demo

# Lint, types, and the tests that start no ranks and no processes.
check: lint
	$(BIN)/python -m pytest -m "not ranks and not processes and not slow"

test: lint docs $(ORACLES)
	$(BIN)/python -m tests.halves -m "not slow"

test-all: lint docs $(ORACLES)
	$(BIN)/python -m tests.halves

lint: $(INSTALLED)
	$(BIN)/ruff check nemo_megacpp tests examples benchmarks docs/hooks.py
	$(BIN)/ruff format --check nemo_megacpp tests examples benchmarks docs/hooks.py
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install: $(INSTALLED)

oracles: $(ORACLES)

$(INSTALLED): pyproject.toml requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "The pinned requirements are for Python 3.11; $(PYTHON) is another. Use make PYTHON=/path/to/python3.11."; exit 1; }
	@echo "Setting up $(VENV): about two minutes and 3.3 GB, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# The references of mamba-ssm and causal-conv1d, without their CUDA kernels.
$(ORACLES): requirements-oracles.txt | $(INSTALLED)
	rm -rf $(@D)
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
	  CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --target $(@D) -r requirements-oracles.txt
	touch $@

clean:
	rm -rf $(VENV) runs data build
