# `make demo`, `make test` and `make check` each set up all that they need; nothing outside this folder is touched.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := .venv-oldest
# Two workers, each on one core: torch would otherwise start a thread per core in each of them. Bytecode is kept whatever
# the environment says: the asserts of all tests are rewritten otherwise, by every worker and in every run.
TEST_WORKERS ?= 2
TESTED := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1

.PHONY: help demo quick test-quick test test-long test-all test-gpu test-oldest check format notebooks install wheel clean
.DEFAULT_GOAL := help

help:  ## list what there is to make
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(STAMP)  ## train baseline and refined on the embedded data and compare them: runs/demo/report.html
	@$(BIN)/i2am ablate experiment=demo

# The packages that compute and no more, with what proves their mathematics; not their few tests that take ten seconds.
PURE := attention config losses metrics ops results
NOT_QUICK := $(addprefix tests/unit/test_,attention_compiled.py attention_trace.py config_store.py metrics_image_quality.py)
QUICK := $(filter-out $(NOT_QUICK),$(foreach name,$(PURE),$(wildcard tests/unit/test_$(name)_*.py))) $(PURE:%=i2am_train/%) \
	tests/contracts/test_losses.py tests/golden tests/properties
PYTEST = $(TESTED) $(BIN)/python -m pytest -q
IN_PARALLEL := -n $(TEST_WORKERS) --dist worksteal

quick: $(STAMP)  ## within a minute: `make check`, and beside it the tests of the packages that only compute
	@$(MAKE) --no-print-directory --jobs=2 --output-sync check test-quick

test-quick: $(STAMP)
	@$(PYTEST) $(QUICK) -m "not long and not slow and not gpu"

test: $(STAMP)  ## all tests but long runs of whole commands (6 minutes on two cores)
	@$(PYTEST) $(IN_PARALLEL) -m "not long and not slow and not gpu"

test-long: $(STAMP)  ## those long runs
	@$(PYTEST) $(IN_PARALLEL) -m "long and not slow and not gpu"

test-all: $(STAMP)  ## every test, those that take minutes, too (an hour)
	@$(PYTEST) $(IN_PARALLEL) -m "not gpu"

test-gpu: $(STAMP)  ## the real commands on a CUDA device (a few minutes; skipped where there is none)
	@$(BIN)/python -m pytest -q -m gpu tests/cuda

# The oldest packages warn of what newer ones changed: warnings are no errors there.
test-oldest: $(OLDEST)/.installed  ## the tests of `make test` and `make test-long` with the oldest packages that pyproject.toml allows
	@$(TESTED) $(OLDEST)/bin/python -m pytest -q $(IN_PARALLEL) -W default -m "not slow and not gpu"

check: $(STAMP)  ## lint, formatting, types, direction of imports
	@echo "ruff check";    $(BIN)/ruff check --quiet .
	@echo "ruff format";   $(BIN)/ruff format --quiet --check . || { echo "Run 'make format'."; exit 1; }
	@echo "import-linter"; $(BIN)/lint-imports --no-cache > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }
	@echo "mypy";          $(BIN)/mypy

format: $(STAMP)  ## put the code into the project's form
	@$(BIN)/ruff format --quiet . && $(BIN)/ruff check --quiet --fix .

notebooks: $(STAMP)  ## run the notebooks (about 8 minutes) and keep their pictures: data/figures/notebooks
	@$(BIN)/python scripts/render_notebooks.py

install: $(STAMP)  ## the virtual environment alone

wheel: $(STAMP)  ## dist/i2am_train-*.whl
	@$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove the virtual environment and everything that tools cached (not runs/ and data/)
	@rm -rf .venv $(OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml scripts/constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}. Run make PYTHON=/path/to/python3.11 ...")'
	@test -x $(BIN)/python || { echo "Creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "Installing torch (the largest part, a few minutes on a slow line)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint scripts/constraints.txt torch torchvision
	@echo "Installing the other packages (versions: scripts/constraints.txt)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable '.[dev]'
	@touch $@

$(OLDEST)/.installed: pyproject.toml scripts/constraints-oldest.txt
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@echo "Installing the oldest packages (versions: scripts/constraints-oldest.txt)"
	@$(OLDEST)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --constraint scripts/constraints-oldest.txt --editable '.[dev]'
	@touch $@
