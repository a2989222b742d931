# Two commands to start with: make demo, make test. Both install into .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench base notebooks clean help

help:            ## Show this list.
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

demo: $(INSTALLED)  ## Teach the embedded base a new subject: the whole job in about three minutes on a CPU.
	$(BIN)/finetune demo --output runs/demo

test: $(INSTALLED)  ## Run the test suite.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## Measure our step against a hand-written loop.
	$(BIN)/python benchmarks/step_overhead.py

base: $(INSTALLED)  ## Build the embedded base model from nothing (hours on a CPU; MINUTES=2 for a quick look).
	$(BIN)/python -m finetune.demo.build --out runs/base --minutes $(or $(MINUTES),240)

notebooks: $(INSTALLED)  ## Write the .ipynb of every notebook from its text.
	$(BIN)/jupytext --quiet --update --to ipynb recipes/notebooks/*.py

clean:           ## Remove .venv and caches; runs/ stays.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
