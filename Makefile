# `make run` and `make test` need nothing but python3 (3.11 or later), make and a C++20 compiler.
#   PYTHON=python3.12                    the Python that .venv is made from
#   TORCH="torch==2.11.0"                the torch that .venv gets, if it has none yet (pip's words)
PYTHON ?= python3
TORCH ?= torch==2.13.0
# `make gpu-report` uses PYTHON as it is, and needs no network.
#   OUT=folder                           where the report goes
#   COMMIT=...                           what the tree is, where it has no .git to say so
OUT ?= out/gpu-report
COMMIT ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
CPP_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
DEPENDENCIES := build/dependencies.stamp
LIBRARY := build/library.stamp

.DEFAULT_GOAL := help
.PHONY: help build run study test sanitize nightly mutants bench gpu-report lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(LIBRARY)  ## .venv with torch, the tools and the package; compiles what changed

run: build  ## train the co-distillation methods on the digits, report into out/
	@$(BIN)/churn-train study digits

study: build  ## the papers' claims and the sources of churn on the digits
	@$(BIN)/churn-train study claims
	@$(BIN)/churn-train sources

test: build  ## the test suite
	@$(BIN)/python -m pytest -q -n 2

sanitize: build  ## the library under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer
	@$(BIN)/python tests/sanitize.py

nightly: build  ## the tests that take too long for every change
	@$(BIN)/python -m pytest -q -n 2 -m nightly

mutants: build  ## does a test see each fault of tests/mutants.toml? (an hour)
	@$(BIN)/python tests/mutants.py

bench: build  ## time losses, hashes, recording and the trainer against their peers
	@mkdir -p out
	@$(BIN)/python -m pytest -q benchmarks --benchmark-only --benchmark-columns=median \
	  --benchmark-json=out/benchmarks.json
	@$(BIN)/python -m benchmarks.table

gpu-report:  ## build, test, compare with the CPU and time on a GPU, into OUT; nine minutes at most
	@PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m benchmarks.gpu "$(OUT)" $(if $(COMMIT),--commit "$(COMMIT)")

lint: build  ## ruff, mypy and clang-format, changing nothing
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --quiet --check
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES) $(wildcard tests/cpp/*)
	@echo "lint: clean"

format: build  ## ruff and clang-format, in place
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet
	@$(BIN)/clang-format -i $(CPP_SOURCES) $(wildcard tests/cpp/*)

clean:  ## delete builds, outputs and caches; .venv stays
	@rm -rf build dist out *.egg-info python/*.egg-info churn_kernels/*.so
	@rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is not Python 3.11 or later; name one: make build PYTHON=..."; exit 1; }
	@echo "==> .venv from $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first and by name: as a build requirement it would come again into an isolated environment.
$(DEPENDENCIES): pyproject.toml setup.py $(VENV)/pyvenv.cfg
	@$(BIN)/python -c 'import torch' 2>/dev/null \
	  || { echo "==> torch ($(TORCH))"; $(PIP) install $(TORCH); }
	@echo "==> build tools, churn_kernels and its test, dev and trainer extras"
	@$(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' \
	  | xargs $(PIP) install
	@$(PIP) install --no-build-isolation --editable '.[test,dev,trainer]'
	@mkdir -p $(@D) && touch $@

$(LIBRARY): CMakeLists.txt $(CPP_SOURCES) $(DEPENDENCIES)
	@echo "==> churn_kernels library"
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@mkdir -p $(@D); test ! -e churn_kernels/libchurn_kernels.so || touch $@  # no compiler: ask again
