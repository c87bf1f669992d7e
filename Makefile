# kvkeep: every task a contributor needs. `make` alone lists them.

PYTHON ?=
VENV ?= .venv
PYTEST_ARGS ?= -n auto
BENCH_ARGS ?=
SOAK_ARGS ?=
LOAD_ARGS ?=

BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEVELOPMENT := $(VENV)/.development-installed
NATIVE := $(shell find native -name '*.cpp' -o -name '*.h')
INSTALL_INPUTS := pyproject.toml scripts/make_venv.sh scripts/install_torch.py \
	native/CMakeLists.txt $(filter-out native/tests/%,$(NATIVE))
# The checks look at the parts of the tree that exist.
CODE := $(wildcard src models benchmarks tests scripts examples)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu faults format bench bench-peers soak load docs clean
.PHONY: check check-format check-lint check-types check-layers check-sizes check-native

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

define install
	@sh scripts/make_venv.sh "$(VENV)" "$(PYTHON)"
	@$(BIN)/python scripts/install_torch.py
	$(BIN)/python -m pip install --quiet --editable "$(1)"
endef

$(RUNTIME): $(INSTALL_INPUTS)
	$(call install,.)
	@touch $@

# Not on top of the other, which would compile the kernels twice.
$(DEVELOPMENT): $(INSTALL_INPUTS)
	$(call install,.[dev])
	@touch $(RUNTIME) $@

setup: $(DEVELOPMENT) ## create .venv with kvkeep and the development tools in it

demo: $(RUNTIME) ## show what the cache does, on the bundled model
	$(BIN)/kvkeep demo

test: $(DEVELOPMENT) ## run the tests (PYTEST_ARGS="-k name" to choose)
	sh scripts/install_servers.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n auto $(PYTEST_ARGS)

faults: $(DEVELOPMENT) ## kill writers of a disk tier 2,000 times, and purges (FAULT_ARGS="--kills 500")
	$(BIN)/python -m tests.faults.kill9 $(FAULT_ARGS)
	$(BIN)/python -m tests.faults.purge_kill9 $(FAULT_ARGS)

test-gpu: $(DEVELOPMENT) ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

check: check-format check-lint check-types check-layers check-sizes ## all checks (make -k check goes on after a fault)

check-format: $(DEVELOPMENT)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

check-lint: $(DEVELOPMENT)
	$(BIN)/ruff check $(CODE)

check-types: $(DEVELOPMENT)
	$(BIN)/mypy $(CODE)

check-layers: $(DEVELOPMENT)
	$(BIN)/lint-imports --no-cache --no-logo

check-sizes: $(DEVELOPMENT)
	$(BIN)/python scripts/check_sizes.py

check-native: $(DEVELOPMENT) ## lint the C++ sources and stress them under sanitizers
	PATH="$(abspath $(BIN)):$$PATH" sh scripts/check_native.sh

format: $(DEVELOPMENT) ## format the code and fix what the linter can fix
	$(BIN)/ruff check --fix --exit-zero --quiet $(CODE)
	$(BIN)/ruff format $(CODE)
	$(BIN)/clang-format -i $(NATIVE)

docs: $(DEVELOPMENT) ## check links, examples and the command line help in the documents
	$(BIN)/python scripts/check_docs.py

bench: $(DEVELOPMENT) ## run every benchmark and write benchmarks/results/
	$(BIN)/python -m benchmarks.run_all $(BENCH_ARGS)

bench-peers: $(DEVELOPMENT) ## measure kvkeep beside other engines, each in an environment under .peers/
	$(BIN)/python -m benchmarks.peers.compare $(BENCH_ARGS)

soak: $(DEVELOPMENT) ## run the long random test of a whole server
	$(BIN)/python -m benchmarks.soak $(SOAK_ARGS)

load: $(DEVELOPMENT) ## load a server with guidellm (LOAD_ARGS="--rate 16")
	sh scripts/load_test.sh $(VENV) $(LOAD_ARGS)

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(wildcard src models benchmarks tests scripts examples) -name __pycache__ -prune -exec rm -rf {} +
