# python3 >= 3.10 makes the environment; `make gpu` runs with PYTHON3's own packages instead.
PYTHON3 ?= python3
VENV ?= .venv
JOBS ?= 2
GPU_NAME ?= h200
GPU_ARCH = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
GPU_JOBS = $(shell $(PYTHON3) -c 'import xdist' 2>/dev/null && echo -n8)
PYTHON := $(VENV)/bin/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(PYTHON) -m pip install --progress-bar off -c constraints.txt
STAMP := $(VENV)/.qkernels-stamp

.PHONY: help venv build test lint format bench demo faults cuda-check gpu gpu-build gpu-test gpu-bench oldest clean

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

lint: $(STAMP) ## ruff, mypy and clang-format, changing nothing
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP) ## ruff and clang-format, rewriting the files
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i

bench: build ## the kernel benchmark of this machine
	$(PYTHON) -m qkernels bench --suite kernels --json build/bench.json

demo: build ## train float, 4-bit and 2-bit on digits, and write a report: about a minute
	$(PYTHON) -m qkernels demo

faults: $(STAMP) ## plant faults in the arithmetic, one at a time, and see the tests catch each (20 minutes)
	$(PYTHON) scripts/plant_faults.py

cuda-check: build ## compile all CUDA and Triton kernels without a GPU; registers and spills
	$(PYTHON) scripts/cuda_check.py --jobs $(JOBS)

gpu: gpu-build ## on a GPU machine, offline, with PYTHON3's own torch: build, test, benchmark
	status=0; $(MAKE) gpu-test || status=1; $(MAKE) gpu-bench || status=1; exit $$status

# The three parts, for machines that are lent by the minute. Only the GPU at hand is compiled for.
gpu-build:
	export QKERNELS_CUDA=1 QKERNELS_CUDA_ARCHS=$(GPU_ARCH); \
	$(PYTHON3) -m pip install --no-build-isolation --no-deps -e . || $(PYTHON3) _backend/native.py
	$(PYTHON3) -m qkernels doctor

gpu-test:
	$(PYTHON3) -m pytest tests $(GPU_JOBS) --ignore=tests/test_cuda_host.py -k "cuda and not triton"
	$(PYTHON3) -m pytest tests $(GPU_JOBS) --ignore=tests/test_cuda_host.py -k triton

gpu-bench:
	$(PYTHON3) -m qkernels bench --suite kernels --csv benchmarks/results/$(GPU_NAME).csv
	$(PYTHON3) -m qkernels bench --suite train --csv benchmarks/results/$(GPU_NAME).csv

oldest: ## build and test with the oldest torch that is promised, in an environment of its own (downloads it)
	$(PYTHON3) -m venv build/oldest
	mkdir -p build/oldest/tree && git archive HEAD | tar xf - -C build/oldest/tree
	build/oldest/bin/pip install torch==2.10.0 'setuptools>=77' ninja pybind11
	cd build/oldest/tree && ../bin/pip install --no-build-isolation -e '.[dev]' && ../bin/python -m pytest -n $(JOBS) --ignore=tests/triton

clean: ## delete what builds and tests leave, keep .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find qkernels -name '*.so' -delete
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
