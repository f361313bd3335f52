# Two commands: `make train` runs the main job, `make test` passes the tests. Each sets up .venv
# first, from pinned requirements; a second run reuses it. `make check` is the fast loop.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes: a test that waits for its ranks or commands leaves a core idle.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# An index that has builds of torch, such as the CPU ones, beside pip's own; a set-up reads it.
TORCH_INDEX_URL ?=
PACKAGES := $(VENV)/.packages
INSTALLED := $(VENV)/.installed
ORACLES := $(VENV)/oracles/.installed
PEERS := $(VENV)/bench/.installed

# Where it is set, every process compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: train check test test-all lint docs bench bench-gpu install oracles clean

train: $(INSTALLED)
	$(BIN)/nemo-megacpp demo --out runs/demo

# Lint, types, and the tests that start no ranks and no processes.
check: lint $(ORACLES)
	$(PYTEST) -m "not ranks and not processes and not slow"

test: lint docs $(ORACLES)
	$(PYTEST) -m "not slow"

test-all: lint docs $(ORACLES)
	$(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check nemo_megacpp tests examples benchmarks docs/hooks.py
	$(BIN)/ruff format --check nemo_megacpp tests examples benchmarks docs/hooks.py
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Speed and memory beside peers: one table, and build/bench-cpu.json. On an idle machine.
bench: $(INSTALLED) $(ORACLES) $(PEERS)
	$(BIN)/python -m benchmarks --device cpu --peers $(dir $(PEERS))

# The same on a GPU, with $(PYTHON) as it is: no set-up, no network, no NeMo. It says what is missing.
bench-gpu:
	$(PYTHON) -m benchmarks --device cuda --limit 150 --total 570

install: $(INSTALLED)

oracles: $(ORACLES)

# From nothing: what an interrupted set-up left, and packages that are pinned no more, go first.
# torch comes with its own dependencies, because PyPI's build has its CUDA libraries in packages of
# their own; the constraints hold them to the pinned set.
$(PACKAGES): requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "The pinned requirements are for Python 3.11 and 3.12; $(PYTHON) is another. Use make PYTHON=/path/to/python3.12."; exit 1; }
	@echo "Setting up $(VENV), once: 3.5 GB with a CPU build of torch, 6.6 GB with a CUDA build."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@echo "== 1 of 4: pip and setuptools"
	$(PIP) -c requirements-cpu.txt pip setuptools
	@echo "== 2 of 4: torch"
	$(PIP) -c requirements-cpu.txt $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	@echo "== 3 of 4: the other pinned packages"
	$(PIP) --no-deps --no-build-isolation -r requirements-cpu.txt
	@echo "== 4 of 4: whether every package has what it requires"
	$(BIN)/python -m pip check
	touch $@

$(INSTALLED): pyproject.toml $(PACKAGES)
	$(PIP) --quiet --no-deps --no-build-isolation -e .
	touch $@

# The references of mamba-ssm and causal-conv1d, without their CUDA kernels.
$(ORACLES): requirements-oracles.txt $(PACKAGES)
	rm -rf $(@D)
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE \
	  CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE \
	  $(PIP) --no-deps --no-build-isolation --target $(@D) -r requirements-oracles.txt
	touch $@

# Peers that only the benchmarks import.
$(PEERS): requirements-bench.txt $(PACKAGES)
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) -r requirements-bench.txt
	touch $@

clean:
	rm -rf $(VENV) runs data build
