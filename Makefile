# python3 >= 3.10 makes the environment; `make gpu` runs with PYTHON3's own packages instead.
PYTHON3 ?= python3
VENV ?= .venv
JOBS ?= 2
GPU_NAME ?= h200
PYTHON := $(VENV)/bin/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(PYTHON) -m pip install --progress-bar off -c constraints.txt
STAMP := $(VENV)/.qkernels-stamp

.PHONY: help venv build test lint format bench demo cuda-check gpu clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '%-12s%s\n' "$$name" "$$text"; done

venv: $(STAMP) ## the development environment in .venv, with the versions of constraints.txt

# torch comes first and alone, so that no later requirement can choose another one; its CUDA wheels bring triton.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python3 >= 3.10 is needed: make PYTHON3=...")'
	test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV)
	$(PIP) torch setuptools ninja pybind11
	$(PYTHON) -c 'import triton' 2>/dev/null || $(PIP) 'triton<3.10'
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

build: $(STAMP) ## compile csrc/ in place, incrementally
	$(PYTHON) _backend/native.py

test: build ## the test suite; Triton's interpreter is chosen at import, so its tests have their own process
	$(PYTHON) -m pytest -n $(JOBS) --ignore=tests/triton
	TRITON_INTERPRET=1 $(PYTHON) -m pytest -n $(JOBS) tests/triton

lint: $(STAMP) ## ruff and clang-format, changing nothing
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP) ## the same tools, rewriting the files
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i

bench: build ## the kernel benchmark of this machine
	$(PYTHON) -m qkernels bench --suite kernels --json build/bench.json

demo: build ## train, measure and report in about a minute
	$(PYTHON) -m qkernels demo

cuda-check: build ## compile all CUDA and Triton kernels without a GPU; registers and spills
	$(PYTHON) scripts/cuda_check.py --jobs $(JOBS)

gpu: ## on a GPU machine, offline, with PYTHON3's own torch: build, test, benchmark
	$(PYTHON3) -m pip install --no-build-isolation --no-deps -e . || $(PYTHON3) _backend/native.py
	$(PYTHON3) -m pytest tests -k "cuda or triton"
	$(PYTHON3) -m qkernels bench --suite kernels --csv benchmarks/results/$(GPU_NAME).csv
	$(PYTHON3) -m qkernels bench --suite train --csv benchmarks/results/$(GPU_NAME).csv

clean: ## delete what builds and tests leave, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find qkernels -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
