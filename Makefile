# Two commands for a newcomer: `make pretrain` and `make test`. Both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
# Processes that run tests; each starts up to 8 ranks, which mostly wait for each other. 0: in this one.
WORKERS ?= 2
# Tokenise in threads; without a word here the library warns at every fork.
export TOKENIZERS_PARALLELISM ?= true

.PHONY: setup pretrain test fast matrix matrix-bits check clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

runs/corpus/ready: .venv/ready examples/demo_corpus.py
	$(BIN)/python examples/demo_corpus.py --output-dir runs/corpus
	touch $@

pretrain: runs/corpus/ready
	$(BIN)/python examples/demo.py --corpus runs/corpus --output-dir $(RUN)

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

fast: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m "not slow and not exhaustive and not bits"

matrix: setup
	$(BIN)/python -m pytest -m exhaustive

matrix-bits: setup
	$(BIN)/python -m pytest -m bits

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
