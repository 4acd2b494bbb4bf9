# Every target makes what it needs, from a fresh clone: the virtual environment, the pinned packages, the code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(wildcard protos/quickchange/v1/*.proto)
NATIVE := setup.py $(wildcard kernels/native/*)
# Tests that run at once, of different files; each has one thread, and so has a server that it starts.
JOBS ?= 2
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-slow lint format protos bench bench-kernels kernels clean install
.DEFAULT_GOAL := help

help:  ## What there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

install: $(STAMP)  ## The virtual environment with everything pinned

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@ls kernels/_native*.so >/dev/null 2>&1 || echo 'The native kernels were not built: no C++ compiler, or it failed. `$(BIN)/quickchange doctor` says what to do.'
	touch $@

kernels:  ## Build the native kernels alone, in place
	@test -x $(BIN)/python || $(MAKE) --no-print-directory install
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: $(STAMP)  ## Train adapters, serve them on one base, swap them live; ARGS=--keep leaves the server up
	$(BIN)/quickchange demo $(ARGS)

test: $(STAMP)  ## Every test that is not slow; JOBS=1 runs one at a time
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-slow: $(STAMP)  ## The slow ones too, one at a time: some look at memory and time
	$(BIN)/python -m pytest -m 'not bench' $(ARGS)

bench: $(STAMP)  ## The server beside others: tables, JSON, plots; ARGS=--quick for a short run
	$(BIN)/python -m tests.bench $(ARGS)

bench-kernels: $(STAMP)  ## Benchmarks of the kernels alone
	$(BIN)/python -m tests.bench.kernels $(ARGS)

lint: $(STAMP)  ## Format, lint, types, floors, protos, stubs up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/hadolint Dockerfile
	@$(MAKE) --no-print-directory protos
	@git diff --exit-code --stat -- quickchange/v1 || { echo 'quickchange/v1 is not what protos/ generates: commit the output of `make protos`'; exit 1; }

format: $(STAMP)  ## Let ruff write
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(STAMP)  ## Generate quickchange/v1 from protos/
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)

clean:  ## Remove the environment and every cache of this folder
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info kernels/_native*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
