# make demo | test | test-all | check | bench | bench-full | scaling | methods | cuda: each sets up .venv by itself.
# make gpu | gpu-bench: with $(PYTHON) as it is.
PYTHON ?= python3
TORCH  := 2.13.0
PY     := .venv/bin/python
READY  := .venv/.ready
SOURCES := $(shell find csrc -type f) $(wildcard qft/compiler/*.py) qft/format.py CMakeLists.txt setup.py pyproject.toml

.PHONY: all demo test test-slow test-all check bench bench-full scaling methods cuda gpu gpu-bench clean
all: $(READY)

# torch comes first and pinned: any looser request would fetch a build of its own choice.
.venv/.torch:
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip install --quiet torch==$(TORCH)
	touch $@

$(READY): .venv/.torch $(SOURCES)
	.venv/bin/pip install --quiet --editable '.[test,docs]'
	touch $@

demo: $(READY)
	$(PY) -m qft demo

# A file's tests stay together: what they share is made once.
test: $(READY)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile -m 'not slow'

# What takes more than five seconds each: the wheel, the site, formats compiled for a page.
test-slow: $(READY)
	$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile -m slow

test-all: test test-slow

check: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $$(find csrc tests/simt bench -name '*.h' -o -name '*.cuh' -o -name '*.cpp')

bench: $(READY)
	$(PY) -m pytest bench --benchmark-enable --benchmark-only

# All that docs/numbers.md and docs/scaling.md hold of the CPU, on a quiet machine; with llama.cpp's ggml where
# GGML=DIR names the folder of a build's libraries.
bench-full: $(READY)
	$(PY) bench/format_errors.py
	$(PY) bench/instructions.py
	$(PY) bench/crossovers.py
	$(PY) bench/speed.py
	$(if $(GGML),$(PY) bench/ggml.py --ggml $(GGML))
	$(PY) bench/scaling.py
	$(PY) bench/scaling_page.py
	$(PY) bench/publish.py

# Time and memory against layers, rows, ranks, threads and models: ten minutes on a quiet machine.
scaling: $(READY)
	$(PY) bench/scaling.py
	$(PY) bench/scaling_page.py

# The ladder of starting points on the demo model: about four hours of one core, resumable.
methods: $(READY)
	$(PY) bench/methods.py --jobs $$(nproc)
	$(PY) bench/methods_page.py

# Every CUDA kernel compiled, with what nvcc says of its registers and spills; needs nvcc and no GPU.
cuda: $(READY)
	$(PY) bench/cuda_resources.py

# On a machine with a GPU, nvcc, torch and pytest, without a network: GPU_ARGS="--commit NAME --output FILE".
gpu:
	$(PYTHON) tests/gpu/run.py $(GPU_ARGS)

gpu-bench:
	$(PYTHON) tests/gpu/run.py --build
	PYTHONPATH=. $(PYTHON) bench/gpu_speed.py $(GPU_ARGS)

clean:
	rm -rf build dist .venv demo-out qft/*.so *.egg-info
