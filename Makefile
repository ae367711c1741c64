PYTHON ?= python3
DEMO ?= examples/demo.py
OUT ?= gpu_results
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
PIP := $(BIN)/python -m pip --disable-pip-version-check

NEWEST := .venv-newest
NEWEST_STAMP := $(NEWEST)/.installed-$(shell date +%F)
NEWEST_PIP := $(NEWEST)/bin/python -m pip --disable-pip-version-check

LOCKER := .venv-lock

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-newest stress docs check format lock gpu clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(STAMP) ## set up, then train, evaluate and compile a small model on the built-in corpus
	$(BIN)/python $(DEMO)

test: $(STAMP) ## set up, then run all tests and the examples of the docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: $(STAMP) ## set up, then run the tests that train, compile and start nothing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not ddp"

test-newest: $(NEWEST_STAMP) ## all tests with the newest of every dependency; downloads gigabytes of CUDA
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal

stress: $(STAMP) ## thousands of damaged files for each reader, of which `make test` has a sample
	STRESS=long OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rP tests/stress

docs: $(DOCS_STAMP) ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(STAMP) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# In an environment of its own: the other one cannot be made before the lock fits pyproject.toml.
lock: ## renew requirements-dev.lock after a change of pyproject.toml or constraints.txt
	$(PYTHON) -m venv $(LOCKER)
	$(LOCKER)/bin/python -m pip install --constraint constraints.txt uv
	UV_CUSTOM_COMPILE_COMMAND='make lock' $(LOCKER)/bin/uv pip compile --quiet pyproject.toml \
	  --group dev --constraint constraints.txt --output-file requirements-dev.lock

# Not in the environment above: a machine with a GPU has a PyTorch of its own, and may have no network.
gpu: ## measure on the GPU, with $(PYTHON)'s own packages, into OUT (PART=decode, TEXT=text.txt)
	$(PYTHON) -m benchmarks.gpu --out $(OUT) $(if $(PART),--part $(PART)) $(if $(TEXT),--text $(TEXT))

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) $(NEWEST) $(LOCKER) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The lock has the hash of every file. Only wheels, since what builds anything else has no hash there.
# PyTorch, a different file for a CPU and for each version of CUDA, has none; what it needs is there.
$(STAMP): pyproject.toml constraints.txt requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes --no-deps --only-binary :all: --requirement requirements-dev.lock
	$(PIP) install --constraint constraints.txt torch==2.13.0
	$(PIP) install --no-build-isolation --no-deps --editable .
	$(PIP) check
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install --constraint constraints.txt --group docs
	@touch $@

# Without constraints, brought up to date once a day; the ranges of pyproject.toml hold.
$(NEWEST_STAMP): pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST_PIP) install --upgrade pip hatchling editables
	$(NEWEST_PIP) install --upgrade --upgrade-strategy eager --no-build-isolation \
	  --editable . --group dev
	@rm -f $(NEWEST)/.installed-*
	@touch $@
