# Two commands on a fresh machine: `make demo` tries the tool, `make test` runs the quick tests.
# Plain torch from PyPI brings several GB of CUDA; take another build with `make demo TORCH=torch==2.13.0`.
PYTHON ?= python3
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
# One process more than there are cores, because many tests wait for processes of their own; whoever has nothing left
# takes tests from the others.
SPREAD := -n $(shell expr $$(nproc 2>/dev/null || echo 2) + 1) --dist worksteal
# `make test COVERAGE=1` also measures which lines of the package the tests run, and fails below the floor of pyproject.toml.
COVERAGE ?=
MEASURE := $(if $(COVERAGE),--cov)

# Tests start the command hundreds of times: it is compiled once, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint sweep docs clean

demo: $(VENV)/.installed
	rm -f feats.h5
	$(BIN)/internvit extract examples/images -o feats.h5 --model tiny-random
	$(BIN)/internvit info feats.h5

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "not sweep" $(SPREAD) $(MEASURE)

sweep: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "sweep or hypothesis" --hypothesis-profile=sweep $(SPREAD) -rP

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed
	$(BIN)/python docs/make_cli.py

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.installed $(VENV)/.installed-test

clean:
	rm -rf $(VENV) feats.h5 feats.h5.skipped.jsonl feats
