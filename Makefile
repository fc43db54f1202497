# make quickstart   set up .venv once, then SFT -> reward model -> PPO on the toy world, ending with a report
# make test         set up .venv once, then all tests but those on hosts
# make test-hosts   tests on several hosts made on this machine (root; Debian's iproute2 and iptables)
# make plan-check   r3hf plan beside torch's own memory tracker, for 1.5 to 70 billion parameters (10 minutes)
#
# PYTHON=...        a Python 3.11 or 3.12 (the lock is made for 3.11)
# TORCH_INDEX=...   package index with torch's CPU wheels, used where pip's own indexes have none
# PIP_ARGS=...      further arguments of every pip install (--index-url, --find-links, --proxy, ...)
# JOBS=2            tests: processes that run them, a file at a time; 1 and ARGS=-s to look at one closely
# ARGS=...          further arguments of the command: make quickstart ARGS=--short, make test ARGS='-k weights'

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test test-hosts lint format bench plan-check clean

SUPPORTED := import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
LOCK := requirements/cpu.txt
TORCH := $(shell grep '^torch==' $(LOCK))
PIP := $(BIN)/python -m pip install -q --no-input --disable-pip-version-check --no-deps $(PIP_ARGS)
# Extra file indexes make pip print one such warning for every package; everything else it says is shown.
QUIETLY := 2>&1 | { grep -v -e 'Location .* is ignored' -e '^ *$$' || true; }

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: .venv/.ready

# The stamp is written last, so an interrupted set-up goes on where it stopped.
.venv/.ready: $(LOCK) pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "r3hf_ray needs Python 3.11 or 3.12: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@command -v cc >/dev/null || { echo "r3hf_ray needs a C compiler (cc) on the path: torch and vLLM build kernels with it" >&2; exit 2; }
	@echo "setting up .venv with $$($(PYTHON) --version): installing $$(grep -c == $(LOCK)) pinned packages (3 minutes the first time)"
	@$(PYTHON) -m venv .venv
	@# A wheel marked +cpu is taken where pip is configured to find one (also from a folder); otherwise from TORCH_INDEX.
	@# PyPI's own Linux wheel is the CUDA build, which cannot be imported without two more gigabytes of libraries.
	@$(PIP) $(TORCH)+cpu >/dev/null 2>&1 || $(PIP) --index-url $(TORCH_INDEX) $(TORCH) $(QUIETLY)
	@$(PIP) -r $(LOCK) $(QUIETLY)
	@$(PIP) --no-build-isolation -e . $(QUIETLY)
	@touch $@
	@echo ".venv is ready"

quickstart: setup
	@$(BIN)/r3hf quickstart $(ARGS)

test: setup
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-hosts: setup
	@$(BIN)/python -m pytest -m hosts tests/hosts $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup
	@PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

plan-check: setup
	@for one in "Qwen2.5-1.5B 4" "Qwen2.5-1.5B 4 gradient_checkpointing=false" "Llama-3-8B 8" "Llama-3-70B 64"; do \
	  PYTHONPATH=tests $(BIN)/python -m plan_check $$one; done

# Runs and models are results, not build products: they stay.
clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find r3hf_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +
