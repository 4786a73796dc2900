# `make demo` and `make test` do all of their own set-up: they need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
LOWEST_STAMP := $(LOWEST)/.installed
# What depends on the versions of torch, transformers and nnsight: the families of models, read.
LOWEST_TESTS := $(addprefix tests/test_,versions.py attention.py capture.py head_mean.py tracer.py)

.PHONY: demo test test-lowest conformance lint types package reasoner clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

conformance: $(STAMP)
	$(BIN)/python -m tests.conformance $(if $(TYPES),--types $(TYPES))

test-lowest: $(LOWEST_STAMP)
	$(LOWEST)/bin/python -m pytest $(LOWEST_TESTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

package: $(STAMP)
	$(BIN)/python tests/check_wheel.py

reasoner: $(STAMP)
	$(BIN)/python examples/reasoner/train.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $(STAMP)

$(LOWEST_STAMP): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet --requirement constraints-lowest.txt --editable .
	touch $(LOWEST_STAMP)

clean:
	rm -rf $(VENV) $(LOWEST) build dist .pytest_cache .mypy_cache .ruff_cache
