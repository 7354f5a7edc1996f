# Two commands on a fresh machine: `make train` and `make test`.
#
#   make setup    .venv with pinned dependencies, and the C++/CUDA extension
#   make train    setup, then a multitask run on the embedded demo corpus
#   make test     setup, then the whole test suite
#   make check    formatting, lint, types and retired words, as CI runs them
#   make docs     the pages under docs/ and of every public name, into build/docs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTENSION_SOURCES := setup.py CMakeLists.txt $(filter-out %.md,$(wildcard csrc/*))

.PHONY: setup setup-dev train test check docs clean

setup: $(VENV)/.built

setup-dev: setup $(VENV)/.dev

train: setup
	$(BIN)/python -m engine.train demo

# A process for each core, whole files at a time, the long ones first.  Idle threads wait instead of
# spinning on the other processes' cores.  A test that hangs fails; the longest takes two minutes.
test: setup-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile \
		--no-loadscope-reorder --timeout=900 --durations=10

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.docs.retired_words
	$(BIN)/clang-format --dry-run --Werror $(filter-out %.md,$(wildcard csrc/*))

docs: setup-dev
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) build kernels/*.so

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d is too old: name one from 3.11 on, as in make setup PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(EXTENSION_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
