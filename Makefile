# Every target sets up what it needs: .venv, pinned by constraints.txt, with all packages of this repository editable.
# Needed beforehand: Python 3.11 to 3.14 with pip and venv, a C++ compiler, make. On Linux with an index that offers torch
# with CUDA by default, a smaller CPU build is had by setting PIP_INDEX_URL or PIP_EXTRA_INDEX_URL as pip documents.

PYTHON ?= python3
PROMPT ?= def read_csv(path):
VENV := .venv/bin
PACKAGES := $(sort $(dir $(wildcard plugins/*/pyproject.toml contrib/*/pyproject.toml)))

BENCHMARKS := $(sort $(filter-out tests/benchmarks/test_%,$(wildcard tests/benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest-pluggy test-hqq lint format bench wheels wheels-imports test-long clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: ## bring .venv up to date (a second run does nothing)
	@$(PYTHON) scripts/set_up.py

demo: setup ## write Python with the embedded model
	@$(VENV)/pluglm generate "$(PROMPT)"

test: setup ## run all tests that need no GPU and no network
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest --timeout=600 -m "not gpu and not network and not long" -n auto --dist loadfile

test-oldest-pluggy: setup ## run the tests of the core on the oldest pluggy we support
	$(PYTHON) -c "import shutil; shutil.rmtree('.venv/oldest', ignore_errors=True)"
	$(VENV)/python -m pip install --quiet --no-deps --target .venv/oldest pluggy==1.6.0
	PYTHONPATH=.venv/oldest OMP_NUM_THREADS=1 $(VENV)/python -m pytest --timeout=600 -m "not gpu and not network and not slow" \
		-n auto --dist loadfile tests/core

test-hqq: setup ## run the tests that need the package hqq, kept apart: Transformers imports it wherever it is installed
	DISABLE_CUDA=1 $(VENV)/python -m pip install --quiet --no-deps --upgrade --target .venv/hqq hqq==0.2.8.post1
	PYTHONPATH=.venv/hqq $(VENV)/python -m pytest --timeout=600 -k hqq -m "not gpu" plugins/pluglm-caches plugins/pluglm-quantizer-hqq

lint: setup ## check style, types and manifests
	$(VENV)/python -m ruff check
	$(VENV)/python -m ruff format --check
	$(VENV)/python -m mypy
	printf '%s\0' $(PACKAGES) | xargs -0 -n 1 -P 2 $(VENV)/pluglm plugins build-manifest --check

format: setup ## rewrite the sources as `make lint` wants them
	$(VENV)/python -m ruff check --fix
	$(VENV)/python -m ruff format

bench: setup ## run every benchmark: a table, then one line of JSON each
	for script in $(BENCHMARKS); do $(VENV)/python "$$script" || exit 1; done

wheels: setup ## build every package and test it alone, from its wheel, without undeclared dependencies
	OMP_NUM_THREADS=1 $(VENV)/python scripts/wheel_test.py

wheels-imports: setup ## build every package and import all of it alone, from its wheel, with what it declares
	OMP_NUM_THREADS=1 $(VENV)/python scripts/wheel_test.py --tests none

test-long: setup ## run the tests that take minutes, which `make test` leaves out
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest --timeout=1200 -m "long and not gpu"

clean: ## remove .venv, caches and built files
	$(PYTHON) -c "import shutil; [shutil.rmtree(name, ignore_errors=True) for name in \
	('.venv', 'build', 'dist', '.hypothesis', '.mypy_cache', '.pytest_cache', '.ruff_cache')]"
