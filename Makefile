# What people type. Every target sets itself up in .venv first; `make help` lists them.
PYTHON ?= python3
# Pinned: a plain `torch` can bring gigabytes of CUDA libraries. Another build: make demo TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0
# Headers alone, for the GEMMs of Hopper and Blackwell.
CUTLASS ?= nvidia-cutlass==4.2.0.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# torch compiles one file at a time where it does not find ninja.
WITH_NINJA = PATH="$(abspath $(BIN)):$$PATH"

OUTPUT ?= benchmarks/results

.PHONY: help demo test browser bench gpu lint docs wheel clean
help:
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/'

demo: $(READY) ## teach the miniature model a new subject from four pictures; see outputs/demo/
	$(BIN)/svdiff demo --output_dir outputs/demo --overwrite

# What measures time and memory runs alone, after the others; of those, two files run at a time, each on one core.
# Both parts run whatever becomes of the first.
TOGETHER := tests/kernels/triton tests/kernels/cuda tests/svdiff tests/miniature tests/examples tests/ui tests/docs
test: $(READY) browser ## all tests, the slow ones included
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER) -n 2 --dist loadfile --benchmark-disable; together=$$?; \
	$(BIN)/python -m pytest tests $(TOGETHER:%=--ignore=%) && exit $$together

# For tests/ui, which are skipped where there is none; Playwright's own browsers would be another download.
browser:
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then \
		if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
			apt-get update && apt-get install -y --no-install-recommends chromium; \
		else echo "== no Chromium here: tests of the page in the browser are skipped"; fi; fi

bench: $(READY) ## a training step of an SD 1.5-size UNet against its rivals
	$(BIN)/svdiff bench unet

# It installs nothing: a machine with a GPU may have no network, and its own torch is the one to measure.
gpu: HERE = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu: ## on a machine with a GPU: build, test and measure, in nine minutes; .venv if there is one, else PYTHON with torch
	@$(HERE) -c "import torch" 2>/dev/null || { echo "make gpu: $(HERE) has no torch; name one that has: make gpu PYTHON=..."; exit 2; }
	PYTHONPATH=.:python:$$PYTHONPATH $(HERE) -m benchmarks.gpu --output $(OUTPUT)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY) ## the site: guides and the API reference; a broken link is an error; see site/index.html
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/docs . site

# Each wheel is built from the source distribution, unpacked. Kernels for GPUs are built from that where they are to run.
wheel: $(READY) ## the source distribution and two wheels, of Python alone and with the extension for CPUs; see dist/
	rm -rf dist
	SVDIFF_BUILD=none $(BIN)/python -m build --no-isolation
	SVDIFF_BUILD=cpu $(WITH_NINJA) $(BIN)/python -m build --no-isolation

# The extension is built in place by the editable install; where there is no compiler, a notice says so and Python serves.
$(READY): pyproject.toml setup.py svdiff_kernels/__init__.py $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/cuda/*)
	@echo "== setting up $(VENV): Python packages, then the C++ extension (once, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on --upgrade "setuptools>=77" wheel ninja pybind11 numpy
	$(BIN)/pip install --progress-bar on $(TORCH)
	$(BIN)/pip install --progress-bar on --no-deps $(CUTLASS)
	$(WITH_NINJA) $(BIN)/pip install --progress-bar on --no-build-isolation -e ".[diffusers,bench,test,lint,docs]"
	$(BIN)/python -m svdiff_kernels.info
	@touch $@

clean: ## forget the set-up and what was built
	rm -rf $(VENV) build dist site outputs *.egg-info svdiff_kernels/*.so
