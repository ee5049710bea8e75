# make reproduce   rebuild the tables and figures at the smallest profile, then the book
# make test        run the tests
# Both install what they need into .venv first. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= smoke
ITEMS ?= all

BIN = $(VENV)/bin
INSTALLED = $(VENV)/.effspinenet-installed
BENCH_INSTALLED = $(VENV)/.effspinenet-bench
PARITY_VENV ?= .venv-parity
PARITY_INSTALLED = $(PARITY_VENV)/.effspinenet-installed
XLA_VENV ?= .venv-xla
XLA_INSTALLED = $(XLA_VENV)/.effspinenet-installed
# The last release of torch_xla, and the releases that it is built for.
XLA_PACKAGES = 'torch_xla==2.9.*' 'torch==2.9.*' 'torchvision==0.24.*'
BOOK = _build/book/html/index.html

.PHONY: help setup reproduce book test bench parity xla lint lint-format lint-code lint-types lint-imports \
        lint-notebooks format clean

help:
	@echo "make setup       install the library and its tools into $(VENV)"
	@echo "make reproduce   run ITEMS=$(ITEMS) at PROFILE=$(PROFILE), then build the book"
	@echo "make book        build the book from the results that are there"
	@echo "make test        run the tests"
	@echo "make lint        check format, code, types, imports and notebooks"
	@echo "make format      put the code in format"
	@echo "make bench       measure speed against peers"
	@echo "make parity      compare the released models with TensorFlow's, in $(PARITY_VENV)"
	@echo "make xla         train a few steps on XLA, the compiler of TPUs, in $(XLA_VENV)"
	@echo "make clean       remove the book, smoke results and caches (results that are kept stay)"

setup: $(INSTALLED)
	@echo "Installed in $(VENV); the command is $(BIN)/effspinenet"

# Installed again whenever pyproject.toml is newer than the last installation.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer \
	is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another: make setup PYTHON=python3.11")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing packages into $(VENV) (PyTorch included: several minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

reproduce: $(INSTALLED)
	$(BIN)/effspinenet reproduce $(ITEMS) --profile $(PROFILE)
	$(BIN)/effspinenet book --profile $(PROFILE)
	@echo "Results: results/ (CSV files, one folder a profile; README.md there explains them)"
	@echo "Book:    $(BOOK)"

book: $(INSTALLED)
	$(BIN)/effspinenet book --profile $(PROFILE)
	@echo "Book: $(BOOK)"

test: $(INSTALLED)
	$(BIN)/python -m pytest
	@echo "Tests: tests/ (one file: $(BIN)/python -m pytest tests/test_cli.py)"

$(BENCH_INSTALLED): $(INSTALLED)
	@echo "Installing what the library is compared with into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

bench: $(BENCH_INSTALLED)
	$(BIN)/python -m benchmarks --output results/speed/speed.csv
	@echo "Speed: results/speed/speed.csv"

# TensorFlow needs older packages than the library's tools; hence an environment of its own.
$(PARITY_INSTALLED): pyproject.toml
	@test -x $(PARITY_VENV)/bin/pip || $(PYTHON) -m venv $(PARITY_VENV)
	@echo "Installing TensorFlow and the library into $(PARITY_VENV) ..."
	@$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[tensorflow]' pytest
	@touch $@

parity: $(PARITY_INSTALLED)
	$(PARITY_VENV)/bin/python -m pytest tests/test_released.py
	$(PARITY_VENV)/bin/python -m benchmarks.parity
	@echo "Parity: results/parity/parity.csv"

# torch_xla needs the PyTorch that it was built for, which need not be the library's.
$(XLA_INSTALLED): pyproject.toml
	@test -x $(XLA_VENV)/bin/pip || $(PYTHON) -m venv $(XLA_VENV)
	@echo "Installing torch_xla and the library into $(XLA_VENV) (several minutes) ..."
	@$(XLA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable . $(XLA_PACKAGES) || { echo "torch_xla cannot be installed for this Python and \
	machine (pip's reason is above); it has packages for Linux on x86-64"; exit 1; }
	@touch $@

xla: $(XLA_INSTALLED)
	$(XLA_VENV)/bin/python -m benchmarks.xla

lint: lint-format lint-code lint-types lint-imports lint-notebooks
	@echo "Lint: all checks passed (settings: pyproject.toml)"

lint-format: $(INSTALLED)
	$(BIN)/ruff format --check .

lint-code: $(INSTALLED)
	$(BIN)/ruff check .

lint-types: $(INSTALLED)
	$(BIN)/mypy

lint-imports: $(INSTALLED)
	$(BIN)/lint-imports

lint-notebooks: $(INSTALLED)
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/nbstripout --keep-id notebooks/*.ipynb
	@echo "Formatted: effspinenet_lib/ tests/ benchmarks/ notebooks/"

clean:
	rm -rf _build runs results/smoke .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	@echo "Removed: _build/ runs/ results/smoke/ and caches; kept: $(VENV) and all other results"
