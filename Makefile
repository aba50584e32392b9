# Each target sets up what it needs in .venv; nothing has to be installed by hand.
# Another interpreter: make quickstart PYTHON=/path/to/python3.12

VENV := .venv
RUN := $(VENV)/bin/python -m
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
NEWER_PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12) $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
# Two test processes side by side, each with its own threads for matrices of five rows, would wait for one another.
export OPENBLAS_NUM_THREADS = 1

.PHONY: help quickstart check test style test-arviz1 docs bench format clean

help:
	@echo "make quickstart   install in $(VENV), fit the sleepstudy model, draw examples/output/sleepstudy.png"
	@echo "make check        install in $(VENV), check style and types, run the quick tests: for every change"
	@echo "make test         install in $(VENV), check style and types, run all tests"
	@echo "make test-arviz1  run the tests of the export to ArviZ with ArviZ 1, where there is a Python 3.12 or newer"
	@echo "make docs         build the documentation in docs/_build/html, warnings as errors"
	@echo "make bench        time updates over the bare gradients of the same potential"
	@echo "make format       rewrite the sources in the project's style"
	@echo "make clean        remove $(VENV) and everything else that these targets made"

quickstart: $(VENV)/.installed-quickstart
	$(VENV)/bin/python examples/sleepstudy.py --output examples/output/sleepstudy.png

# Stealing keeps the tests of a file in one process as far as it can: what they share is made once.
PYTEST := $(RUN) pytest -n 2 --dist worksteal

check: style
	$(PYTEST) -m "not slow"

test: style
	$(PYTEST)

style: $(VENV)/.installed-test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

# ArviZ 1 needs Python 3.12, and .venv may have an older one.
test-arviz1:
	@for python in $(NEWER_PYTHONS); do \
	    if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
	        echo "Testing with ArviZ 1 and $$("$$python" --version)" && \
	        if ! test -e $(VENV)-arviz1/.installed; then \
	            "$$python" -m venv $(VENV)-arviz1 && \
	            $(VENV)-arviz1/bin/python -m pip install --quiet --editable ".[plots]" "arviz>=1" h5netcdf h5py "pytest>=8.2" && \
	            touch $(VENV)-arviz1/.installed; \
	        fi && \
	        exec $(VENV)-arviz1/bin/python -m pytest tests/test_inference_data.py; \
	        exit 1; \
	    fi; \
	done; \
	echo "Skipped the tests with ArviZ 1: no Python 3.12 or newer (tried: $(NEWER_PYTHONS))."

docs: $(VENV)/.installed-docs
	$(RUN) sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

bench: $(VENV)/.installed-quickstart
	$(VENV)/bin/python benchmarks/updates.py
	$(VENV)/bin/python benchmarks/momentum_updates.py

format: $(VENV)/.installed-test
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:
	rm -rf $(VENV) $(VENV)-arviz1 build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis examples/output docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each candidate is run, because the name alone proves nothing: a version manager's shim may exist and still fail.
$(VENV)/.made:
	@for python in $(PYTHONS); do \
	    if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "Making $(VENV) with $$("$$python" --version) ($$python)"; \
	        "$$python" -m venv $(VENV) && touch $@; exit; \
	    fi; \
	done; \
	echo "No Python 3.11 or newer that can make virtual environments (tried: $(PYTHONS))." >&2; \
	echo "Install one (on Debian and Ubuntu with python3-venv), or name yours: make PYTHON=/path/to/python" >&2; \
	exit 1

$(VENV)/.installed-quickstart: $(VENV)/.made pyproject.toml
	@echo "Installing numpyro_smcopt in $(VENV); the first time this takes a minute or two"
	@$(RUN) pip install --quiet --editable ".[plots]"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.made pyproject.toml
	@echo "Installing numpyro_smcopt and its test tools in $(VENV); the first time this takes a few minutes"
	@$(RUN) pip install --quiet --editable ".[test,dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.made pyproject.toml
	@echo "Installing numpyro_smcopt and Sphinx in $(VENV); the first time this takes a minute or two"
	@$(RUN) pip install --quiet --editable ".[docs,plots]"
	@touch $@
