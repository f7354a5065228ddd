# Every target sets itself up: a .venv with torch, what the target needs, and the compiled library.
#   make demo        quantize, fine-tune, merge and save a real language model
#   make test        the tests        make lint    the linters
#   make bench       every op and a whole model beside their peers: about ten minutes
#   make bench-micro     what a call costs on small layers
#   make bench-compare BASE=main     this working tree against another version, in turns
#   make gpu         on a machine with an NVIDIA GPU, by its own python: build, test, check and measure; nine minutes

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
CXX_NAMES := -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
BUILD  := pyproject.toml setup.py $(shell find csrc $(CXX_NAMES))

.PHONY: demo test lint bench bench-micro bench-compare gpu clean
.SECONDARY:

# Threads that wait for others spin; on a busy machine that is 20 times slower, so let them sleep soon.
demo: export GOMP_SPINCOUNT ?= 1000
demo: $(VENV)/.installed-demo
	$(BIN)/nf4kernels demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks

bench-micro: $(VENV)/.installed-bench
	$(BIN)/python -m pytest benchmarks/ops/bench_micro.py --benchmark-only \
	    --benchmark-columns=median,iqr,rounds --benchmark-time-unit=us

bench-compare: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks.compare $(or $(BASE),$(error say which version: make bench-compare BASE=main))

# By the machine's own python: its torch knows CUDA, and there may be no network to make a .venv from.
gpu:
	$(PYTHON) benchmarks/gpu/run.py

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/executor $(CXX_NAMES))

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.torch: $(VENV)/.venv
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy "setuptools>=77" wheel
	touch $@

# torch first, on its own: it is then not replaced, and the extension is compiled against it.
$(VENV)/.installed-%: $(VENV)/.torch $(BUILD)
	@echo "setting up: $* (in $(VENV))"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

# The linters need no build.
$(VENV)/.installed-lint: $(VENV)/.venv pyproject.toml
	$(BIN)/python -m pip install --quiet $$(sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info nf4kernels/*.so
