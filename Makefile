# One command on a fresh machine: `make demo` or `make test`. Everything goes into $(VENV), nothing is global.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More arguments for pytest: make test ARGS='tests/unit -x'
ARGS ?=
# More options for pip: make install PIP_OPTIONS=--no-compile
PIP_OPTIONS ?=
# Processes for tests that need no cluster.
TEST_PROCESSES ?= 2
# Folder of molecules for make results, laid out as jobs/results.py says; none: molecules made here.
DATA ?=

.DELETE_ON_ERROR:
.PHONY: help install test test-lowest demo results results-quick lint style types audit audit-offline manifests cluster-test format clean

help:
	@echo 'make install   create $(VENV) with the package, its tests and its linters'
	@echo 'make demo      the whole way on sample molecules: prepare, pretrain, sweep, embed'
	@echo 'make results   what pretraining is worth, with the molecules in DATA=DIR (hours; see docs/results.md)'
	@echo 'make results-quick   a reduced version (minutes)'
	@echo 'make test      all tests (of real molecules: where they lie beside this folder)'
	@echo 'make lint      ruff and mypy, of tests and benchmarks too (style, types: one of them)'
	@echo 'make audit     published advisories for the pinned versions (asks the network); audit-offline: do they fit together'
	@echo 'make test-lowest   all tests with the oldest versions that pyproject.toml allows, in $(LOWEST)'
	@echo 'make manifests   render and check the KubeRay manifests'
	@echo 'make cluster-test   all jobs submitted to a local Ray head with token, two nodes and S3 storage (minutes)'
	@echo 'make format    let ruff rewrite the sources'
	@echo 'make clean     remove caches, builds and runs (not $(VENV))'

install: $(STAMP)

# torch first and alone: later requirements then find it, whichever build this machine's pip offers.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing torch ...'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_OPTIONS) torch
	@echo 'installing moleblend-ray and its requirements ...'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_OPTIONS) -e '.[test,dev]'
	touch $@

# First what needs one core a test, a file on each of $(TEST_PROCESSES), in the order of their names: those with the most tests
# first, as is usual, would leave the longest test to one process at the end. Then, one after the other, what starts clusters and
# commands: two at a time take as long on two cores. 5: of the tests asked for, none is of that kind.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m 'not ray' --durations=10 $(ARGS) || [ $$? -eq 5 -a -n "$(ARGS)" ]
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m ray --durations=10 $(or $(ARGS),tests/ray tests/e2e) || [ $$? -eq 5 -a -n "$(ARGS)" ]

demo: install
	$(BIN)/python jobs/demo.py

results: install
	$(BIN)/python jobs/results.py $(if $(DATA),--data $(DATA)) --out runs/results

results-quick: install
	$(BIN)/python jobs/results.py $(if $(DATA),--data $(DATA)) --out runs/results-quick --quick

lint: style types

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# Published advisories for the pinned versions: what could not be looked up is a failure.
audit: install
	test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

audit-offline: install
	$(BIN)/python -m pip check --disable-pip-version-check

# With the oldest versions of what pyproject.toml names (UV_FIND_LINKS: a folder with a build of PyTorch for CPUs).
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra test --extra gcs --python $(LOWEST)/bin/python -o $(LOWEST)/requirements.txt pyproject.toml
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/requirements.txt --no-deps -e .
	touch $(LOWEST)/.installed
	$(MAKE) test VENV=$(LOWEST)

manifests: install
	$(BIN)/python -m infra.checks

cluster-test: install
	$(BIN)/python jobs/cluster_test.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist runs outputs wandb .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find moleblend_ray jobs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
