# Every target sets itself up: a .venv with torch, what the target needs, and the compiled library.
#   make setup           only that, for the tests and the linters
#   make demo            quantize, fine-tune, merge and save a real language model
#   make build           the compiled library in this checkout; after an edit, of what changed alone
#   make check K=linear  what touches one op: the quick tests of test_linear.py, on every way to run it; a K that names
#                        no file is pytest's -k
#   make test            the tests, on every core
#   make test-slow       those that need a download or minutes, which make test leaves out; CI leaves out those marked
#                        exhaustive: sanitizers and compilers, for who changed a kernel
#   make test-oldest     those of the integrations on the oldest transformers, PEFT, accelerate and TRL, in .venv-oldest
#   make mutants         each barrier, wait, commit and fence of the CUDA kernels left out in turn: which no test notices
#   make wheel           one wheel into dist/, named by the glibc that it needs
#   make lint            the linters: ruff, clang-format, mypy, and warnings of the C++ compiler
#   make format          what ruff and clang-format can mend
#   make bench           every op and a whole model beside their peers: about seventeen minutes
#   make bench-micro     what a call costs on small layers
#   make bench-compare BASE=main     this working tree against another version, in turns
#   make gpu             on a machine with an NVIDIA GPU, by its own python: build, check, measure, tune; nine minutes
#   make clean           away with .venv and all that was built

PYTHON  ?= python3
TORCH   ?= torch==2.13.0
VENV    ?= .venv
# Processes that run the tests; each takes 0.7 GB.
WORKERS ?= auto --maxprocesses 8
BIN     := $(VENV)/bin
OLDEST  := .venv-oldest
# Of the marks in pyproject.toml, what make test-slow runs.
SLOW    ?= slow
# By files: what a file sets up for all its tests is then set up once.
PYTEST  := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
CXX_NAMES := -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'
SOURCES := $(shell find csrc $(CXX_NAMES))

needed = $(if $(filter $1,$(MAKECMDGOALS)),$(if $($2),,$(error say which $3: make $1 $2=$4)))
$(call needed,check,K,tests,linear)
$(call needed,bench-compare,BASE,version,main)

.PHONY: setup demo build check test test-slow test-oldest mutants wheel bench bench-micro bench-compare gpu clean
.PHONY: lint lint-ruff lint-format lint-clang-format lint-mypy lint-warnings format
.SECONDARY:
.NOTPARALLEL:  # one pip at a time in one environment

setup: $(VENV)/.installed-test $(VENV)/.installed-lint $(VENV)/.built

# Threads that wait for others spin; on a busy machine that is 20 times slower, so let them sleep soon.
demo: export GOMP_SPINCOUNT ?= 1000
demo: $(VENV)/.installed-demo $(VENV)/.built
	$(BIN)/nf4kernels demo

build: $(VENV)/.torch
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $(VENV)/.built

check: CHECKED = $(if $(word 2,$(K)),,$(wildcard tests/test_$(K).py tests/*/test_$(K).py))
check: $(VENV)/.installed-test $(VENV)/.built
	$(PYTEST) --dist worksteal -q -m "not slow" $(or $(CHECKED),-k "$(K)")

test: $(VENV)/.installed-test $(VENV)/.built
	$(PYTEST) -m "not slow" --durations=15 --durations-min=20

test-slow: $(VENV)/.installed-test $(VENV)/.built
	$(PYTEST) -m "$(SLOW)" --durations=15 --durations-min=20

test-oldest:
	$(MAKE) VENV=$(OLDEST) $(OLDEST)/.installed-test-oldest $(OLDEST)/.built
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" tests/integrations

mutants: $(VENV)/.installed-test $(VENV)/.built
	PYTHONPATH=.:tests $(BIN)/python -m executor.mutants

wheel: $(VENV)/.torch
	$(BIN)/python .ci/wheel.py

bench: $(VENV)/.installed-bench $(VENV)/.built
	$(BIN)/python -m benchmarks

bench-micro: $(VENV)/.installed-bench $(VENV)/.built
	$(BIN)/python -m pytest benchmarks/ops/bench_micro.py --benchmark-only \
	    --benchmark-columns=median,iqr,rounds --benchmark-time-unit=us

bench-compare: $(VENV)/.installed-bench $(VENV)/.built
	$(BIN)/python -m benchmarks.compare $(BASE)

# By the machine's own python: its torch knows CUDA, and there may be no network to make a .venv from.
gpu:
	$(PYTHON) benchmarks/gpu/run.py

lint: lint-ruff lint-format lint-clang-format lint-mypy lint-warnings

lint-ruff: $(VENV)/.installed-lint
	$(BIN)/ruff check .

lint-format: $(VENV)/.installed-lint
	$(BIN)/ruff format --check .

lint-clang-format: $(VENV)/.installed-lint
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests/executor tests/arm tests/tiles $(CXX_NAMES))

lint-mypy: $(VENV)/.installed-lint
	$(BIN)/python -m mypy nf4kernels

lint-warnings: $(VENV)/.torch
	$(BIN)/python .ci/check_warnings.py

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests/executor tests/arm tests/tiles $(CXX_NAMES))

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# torch first, on its own: it is then not replaced, and the extension is compiled against it.
$(VENV)/.torch: $(VENV)/.venv
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy "setuptools>=77" wheel
	touch $@

$(VENV)/.built: $(VENV)/.torch setup.py $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

$(VENV)/.installed-%: $(VENV)/.torch pyproject.toml setup.py
	@echo "setting up: $* (in $(VENV))"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@

# The linters need no build; mypy reads the types of torch and numpy.
$(VENV)/.installed-lint: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet $$(awk '/^lint = \[/,/\]/ { gsub(/lint = |[][",]/, ""); print }' pyproject.toml)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info nf4kernels/*.so
