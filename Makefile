# What each target does: `make help`.  Needs python3 >= 3.11 with pip, and make; nothing else.

PYTHON ?= python3
VENV ?= .venv
MODEL ?= smollm2
HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
# Extras to install with pip: dev (tests, linters, the openai client), cuda13, tpu, parity, ray.
EXTRAS ?= dev

BIN := $(VENV)/bin
GPU_VENV ?= .venv-gpu-check
GPU_BIN := $(GPU_VENV)/bin
# What pip puts on sys.path is the checkout itself ("compat"): behind an import hook, which is the default, a script run
# from the folder that a clone named jaxserve lies in would find that folder in the package's place.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
EDITABLE := --config-settings editable_mode=compat --editable
comma := ,
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help install serve test lint format models gpu-check clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo "  Variables: PYTHON=$(PYTHON) MODEL=$(MODEL) PORT=$(PORT) HOST=$(HOST) ARGS=… EXTRAS=$(EXTRAS)"

install: $(STAMP)  ## Create .venv and install jaxserve into it

serve: install  ## Serve MODEL (default: SmolLM2-135M, fetched) on HOST:PORT; ARGS= more flags
	@if [ "$(MODEL)" = smollm2 ]; then $(BIN)/python -m jaxserve.loading.fetch smollm2 >/dev/null; fi
	@exec $(BIN)/jaxserve serve "$(MODEL)" --host $(HOST) --port $(PORT) $(ARGS)

test: install  ## Run the tests; ARGS= more pytest arguments.  Fetches the real models; without them their tests skip
	-@$(BIN)/python -m jaxserve.loading.fetch smollm2 qwen2.5-coder-0.5b
	$(BIN)/python -m pytest $(ARGS)

lint: install  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install  ## Let ruff put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

models: install  ## Fetch the two small models of the real-model tests (590 MB)
	$(BIN)/python -m jaxserve.loading.fetch smollm2 qwen2.5-coder-0.5b

gpu-check: $(GPU_VENV)/.installed  ## Compile the steps for an H100 without a GPU, and check what became of them (an environment of 1.9 GB)
	$(GPU_BIN)/python -W ignore -m tests.gpu_compile.check

clean:  ## Remove the environment and caches
	rm -rf $(VENV) $(GPU_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# Installed again only when pyproject.toml changes.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.11 or newer, or say PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), and jaxserve needs 3.11 or newer: say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { \
	  echo "make: $(PYTHON) cannot make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python $(PIP_INSTALL) $(EDITABLE) '.[$(EXTRAS)]'
	@touch $@

# An environment of its own: beside the plug-in JAX would ask every other test for a GPU's driver.
$(GPU_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_BIN)/python $(PIP_INSTALL) $(EDITABLE) .
	version=$$($(GPU_BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	$(GPU_BIN)/python $(PIP_INSTALL) \
	  "jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version" nvidia-cuda-nvcc
	@touch $@
