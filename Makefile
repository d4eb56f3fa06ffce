# make quickstart   train a tiny Oryx model on this machine, from nothing to a sample of its text
# make test         lint, type check, tests (within 25 minutes on 2 cores)
# make soak         the slow tests too
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test soak lint types clean

quickstart: $(READY)
	@$(BIN)/python tools/quickstart.py

# Files as they are collected, the long ones first, so that no worker ends alone.
test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

soak: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 7200

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# A virtual environment with all that is needed, made anew when a pin changes.
$(READY): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or say make PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
