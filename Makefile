# `make quickstart` and `make test` need only python3 and make: they build their own
# virtual environment, once, and again when the requirements change.
#
#   make quickstart ARGS="--data mnist --seconds 60"
#   make test       ARGS="-k quickstart"

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=

# JAX finds eigenbases by OpenBLAS, whose threads spin for 2^28 cycles after each call and keep
# a core from the steps that follow; after 2^4 they sleep.
export OPENBLAS_THREAD_TIMEOUT ?= 4

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help quickstart test lint format bench bench-numpyro bench-scaling bench-learning clean

help:
	@echo "make quickstart   train a sigmoid belief network by RWS and NaturalRWS; table and figure"
	@echo "make test         format check, lint, types, tests"
	@echo "make lint         format check, lint, types"
	@echo "make format       format and sort imports"
	@echo "make bench        the time of one step in Pyro, against the host and by hand"
	@echo "make bench-numpyro  the same in NumPyro"
	@echo "make bench-scaling   the time of one step in NumPyro against width, K and depth"
	@echo "make bench-learning  learning curves in NumPyro, and with --time-epoch the time of an epoch"
	@echo "make clean        remove the virtual environment and the caches"

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[pyro,numpyro,tutorials,dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/python -m pyro_helmholtz.quickstart $(ARGS)

lint: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# One thread for each worker: more of them than cores make torch crawl.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/step_time.py $(ARGS)

bench-numpyro: $(STAMP)
	$(BIN)/python benchmarks/numpyro_step_time.py $(ARGS)

bench-scaling: $(STAMP)
	$(BIN)/python benchmarks/numpyro_scaling.py $(ARGS)

bench-learning: $(STAMP)
	$(BIN)/python benchmarks/numpyro_learning.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
