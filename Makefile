# Two commands: `make train` runs the main job, `make test` passes the tests. Each sets up .venv
# first, from pinned requirements; a second run reuses it. `make check` is the fast loop.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes: a test that waits for its ranks or commands leaves a core idle.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
INSTALL := python -m pip install --disable-pip-version-check
PIP := $(BIN)/$(INSTALL)
# An index that has builds of torch, such as the CPU ones, beside pip's own; a set-up reads it.
TORCH_INDEX_URL ?=
PACKAGES := $(VENV)/.packages
INSTALLED := $(VENV)/.installed
# The environment of the newest Megatron-Core, and the tests that run in it: those that touch Megatron.
# Left to the default one are the scans of mixers/kernels, which are plain torch and Triton, the same
# releases in both (their oracles are in that environment alone); pretrain_mamba.py's arguments
# (megatron_args/test_argument_list.py), a script of 0.16; and the command line, which asks no Megatron.
PYTHON312 ?= python3.12
CORE_NEW := .venv-core-new
BRIDGE := .venv-bridge
CORE_NEW_TESTS := $(addprefix tests/,core settings proof specs checkpoint evaluation inference contract runtime mixers \
  examples hf data/test_adopt.py data/test_packed_rows.py data/test_prepare.py data/test_prepared.py \
  megatron_args/test_hybrid_dialect.py test_config.py test_families.py test_layout.py \
  test_mixer_settings.py test_pattern.py test_rooms.py)
ORACLES := $(VENV)/oracles/.installed
PEERS := $(VENV)/bench/.installed
LM_EVAL := $(VENV)/lm-eval/.installed

# Where it is set, every process compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: train check test test-all test-core-new test-bridge lint docs bench bench-gpu install core-new \
  bridge oracles lm-eval clean

train: $(INSTALLED)
	$(BIN)/nemo-megacpp demo --out runs/demo

# Lint, types, and the tests that start no ranks and no processes.
check: lint $(ORACLES)
	$(PYTEST) -m "not ranks and not processes and not slow"

test: lint docs $(ORACLES)
	$(PYTEST) -m "not slow"

test-all: lint docs $(ORACLES) $(LM_EVAL)
	$(PYTEST)

# What touches Megatron, on the newest Megatron-Core. The default environment is set up as well: each
# loads a checkpoint that the other has saved.
test-core-new: $(CORE_NEW)/.installed $(INSTALLED)
	$(CORE_NEW)/bin/python -m pytest -n 2 --dist loadgroup -m "not slow" -rs \
	  --ignore tests/mixers/kernels $(CORE_NEW_TESTS)

# Runs through Megatron-Bridge: in layouts, in its environment; and compared with runs through NeMo, in
# the default one.
test-bridge: $(BRIDGE)/.installed $(INSTALLED)
	$(BRIDGE)/bin/python -m pytest -rs tests/bridge
	$(BIN)/python -m pytest -rs tests/bridge

lint: $(INSTALLED)
	$(BIN)/ruff check nemo_megacpp tests examples benchmarks docs/hooks.py
	$(BIN)/ruff format --check nemo_megacpp tests examples benchmarks docs/hooks.py
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.bridge

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Speed and memory beside peers: one table, and build/bench-cpu.json. On an idle machine.
bench: $(INSTALLED) $(ORACLES) $(PEERS)
	$(BIN)/python -m benchmarks --device cpu --peers $(dir $(PEERS))

# The same on a GPU, with $(PYTHON) as it is: no set-up, no network, no NeMo. It says what is missing.
bench-gpu:
	$(PYTHON) -m benchmarks --device cuda --limit 150 --total 570

install: $(INSTALLED)

core-new: $(CORE_NEW)/.installed

bridge: $(BRIDGE)/.installed

oracles: $(ORACLES)

# lm-evaluation-harness, which a test of `make test-all` runs on an export.
lm-eval: $(LM_EVAL)

# From nothing: what an interrupted set-up left, and packages that are pinned no more, go first.
# torch comes with its own dependencies, because PyPI's build has its CUDA libraries in packages of
# their own; the constraints hold them to the pinned set.
# $(1): Python, $(2): the environment's folder, $(3): its pinned requirements, $(4): a pipe that the
# findings of `pip check` go through, where some are expected.
define set_up
	rm -rf $(2)
	$(1) -m venv $(2)
	@echo "== 1 of 4: pip and setuptools"
	$(2)/bin/$(INSTALL) -c $(3) pip setuptools
	@echo "== 2 of 4: torch"
	$(2)/bin/$(INSTALL) -c $(3) $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch
	@echo "== 3 of 4: the other pinned packages"
	$(2)/bin/$(INSTALL) --no-deps --no-build-isolation -r $(3)
	@echo "== 4 of 4: whether the packages go together"
	$(2)/bin/python -m pip check $(4)
endef

$(PACKAGES): requirements-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "The pinned requirements are for Python 3.11 and 3.12; $(PYTHON) is another. Use make PYTHON=/path/to/python3.12."; exit 1; }
	@echo "Setting up $(VENV), once: 3.5 GB with a CPU build of torch, 6.6 GB with a CUDA build."
	$(call set_up,$(PYTHON),$(VENV),requirements-cpu.txt)
	touch $@

# The newest Megatron-Core needs Python 3.12, and a set without NeMo.
$(CORE_NEW)/.packages: requirements-core-new.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "The newest Megatron-Core is tested on Python 3.12; $(PYTHON312) is another, or not there. Use make $(MAKECMDGOALS) PYTHON312=/path/to/python3.12."; exit 1; }
	@echo "Setting up $(CORE_NEW), once: 1.2 GB with a CPU build of torch, 5 GB with a CUDA build."
	$(call set_up,$(PYTHON312),$(CORE_NEW),requirements-core-new.txt)
	touch $@

$(CORE_NEW)/.installed: pyproject.toml $(CORE_NEW)/.packages
	$(CORE_NEW)/bin/$(INSTALL) --quiet --no-deps --no-build-isolation -e .
	touch $@

# Megatron-Bridge, whose parts name more than they import: packages that are not there are no finding.
$(BRIDGE)/.packages: requirements-bridge.txt
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || \
	  { echo "Megatron-Bridge needs Python 3.12; $(PYTHON312) is another, or not there. Use make $(MAKECMDGOALS) PYTHON312=/path/to/python3.12."; exit 1; }
	@echo "Setting up $(BRIDGE), once: 2 GB with a CPU build of torch, 6 GB with a CUDA build."
	$(call set_up,$(PYTHON312),$(BRIDGE),requirements-bridge.txt,| { ! grep "has requirement"; })
	touch $@

$(BRIDGE)/.installed: pyproject.toml $(BRIDGE)/.packages
	$(BRIDGE)/bin/$(INSTALL) --quiet --no-deps --no-build-isolation -e .
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

# lm-evaluation-harness, behind the packages of the environment.
$(LM_EVAL): requirements-lm-eval.txt $(PACKAGES)
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) -r requirements-lm-eval.txt
	touch $@

clean:
	rm -rf $(VENV) $(CORE_NEW) $(BRIDGE) runs data build
