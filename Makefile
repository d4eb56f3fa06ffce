# make quickstart   train a tiny Oryx model on this machine, from nothing to a sample of its text
# make install      the environment .venv, which `source .venv/bin/activate` enters
# make test         lint, type check, tests (within 25 minutes on 2 cores)
# make python-3.12  tests of what depends on the version of megatron-core or torch, under Python 3.12
# make soak         the slow tests too
# make wheel        the package for elsewhere, in dist/
# make docs         the site of docs/ and the docstrings, in site/; a broken link ends it
# make hf-suite     transformers' own model tests with Oryx plugged in, both mixers, three mode plans (fetches them)
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# First and last version of transformers that an export runs with; the environment's own lies between.
ENDS := 5.14 5.24

.PHONY: quickstart install test python-3.12 soak hf-suite lint types wheel docs clean $(ENDS:%=transformers-%)

quickstart: $(READY)
	@$(BIN)/python tools/quickstart.py

install: $(READY)
	@echo 'enter the environment: source $(BIN)/activate'

# Files as they are collected, the long ones first, so that no worker ends alone.
test: lint types $(ENDS:%=transformers-%)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

python-3.12: $(READY)
	.ci/python-3.12

soak: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 7200

# The tests of the version that is installed; TRANSFORMERS_TESTS names those of a checkout instead.
HF_SUITE := build/hf-suite
hf-suite: $(READY)
	@set -e; [ -z "$$TRANSFORMERS_TESTS" ] || exit 0; mkdir -p $(HF_SUITE); \
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("transformers"))'); \
	[ ! -d $(HF_SUITE)/transformers-$$version ] || exit 0; \
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
	    --no-build-isolation --dest $(HF_SUITE) transformers==$$version; \
	rm -rf $(HF_SUITE)/part; mkdir $(HF_SUITE)/part; tar -xzf $(HF_SUITE)/transformers-$$version.tar.gz -C $(HF_SUITE)/part; \
	mv $(HF_SUITE)/part/transformers-$$version $(HF_SUITE)/
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 RUN_SLOW=1 $(BIN)/python -m pytest -q -n 2 -r fEX -o verbosity_subtests=0 tests/hf_suite/suite.py

# The tests of the exported model under another version of transformers, installed beside the environment.
$(ENDS:%=transformers-%): transformers-%: $(VENV)/transformers-%/.ready
	PYTHONPATH="$(abspath $(VENV)/$@)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q --no-header -p no:cacheprovider \
		tests/numerics/test_hf_model.py tests/numerics/test_hf_generate.py tests/numerics/test_hf_as_others.py tests/integration/test_hf_standalone.py

$(VENV)/transformers-%/.ready: tests/transformers-%.txt $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target $(@D) -r $<
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/shellcheck -x launch/*.sh .ci/*

types: $(READY)
	$(BIN)/mypy

# dist/oryx_megatron-VERSION-py3-none-any.whl, with all that a run needs (docs/releasing.md).
wheel: $(READY)
	rm -rf build/lib
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# Strict: a link to a page, heading or file that is not there is an error (mkdocs.yml).
docs: $(VENV)/docs/.ready
	PYTHONPATH="$(abspath $(VENV)/docs)" NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo 'site/index.html'

$(VENV)/docs/.ready: requirements-docs.txt $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --target $(@D) -r $<
	@touch $@

# A virtual environment with all that is needed, made anew when a pin changes.
$(READY): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or say make PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
