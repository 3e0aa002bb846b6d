# `make figures` and `make test` do everything on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/
INSTALL = $(RUN)python -m pip install --quiet --constraint constraints.txt --editable

figures: $(VENV)/figures
	$(RUN)linfit figures --out output

test: $(VENV)/test
	$(RUN)python -m pytest -n auto --dist worksteal
	$(RUN)python -m pytest -n auto --dist worksteal --float32 -m numerical

# Everything but the slow tests, for everyday work.
quick: $(VENV)/test
	$(RUN)python -m pytest -n auto --dist worksteal -m "not slow"

BENCH = OPENBLAS_NUM_THREADS=1 NPROC=4 $(RUN)python -m

bench: $(VENV)/test
	$(BENCH) pytest benchmarks --benchmark-columns=median,min,rounds --benchmark-sort=name

# Every benchmark at a size that takes seconds, to see that it runs.
bench-quick: $(VENV)/test
	BENCH_QUICK=1 $(BENCH) pytest benchmarks --benchmark-disable
	$(BENCH) benchmarks.bench_scale --size 20 1000
	$(BENCH) benchmarks.bench_scale --sweep --quick
	$(BENCH) benchmarks.bench_bridge --bytes 3e7 --repeats 1
	$(BENCH) benchmarks.bench_explorer --page empty --page overtraining --presses 1

# The everyday tests against the lower bounds in pyproject.toml; .ci/oldest.txt keeps those that were tried last.
oldest:
	$(PYTHON) -m venv --clear $(VENV)/oldest
	$(PYTHON) .ci/oldest.py > $(VENV)/oldest/constraints.txt
	$(VENV)/oldest/bin/python -m pip install --quiet --constraint $(VENV)/oldest/constraints.txt --editable '.[test]'
	$(VENV)/oldest/bin/python -m pytest -n auto --dist worksteal -p no:cacheprovider -m "not slow"
	cp $(VENV)/oldest/constraints.txt .ci/oldest.txt

# Every deliberate mistake in sims/mutants, and which claim notices it.
mutants: $(VENV)/test
	$(RUN)python -m sims.mutants

lint: $(VENV)/test
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)lint-imports

docs: $(VENV)/docs
	$(RUN)sphinx-build -W --keep-going docs output/docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/figures: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[data]'
	touch $@

$(VENV)/test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[test]'
	touch $@

$(VENV)/docs: $(VENV)/test
	$(INSTALL) '.[docs]'
	touch $@

.PHONY: figures test quick bench bench-quick oldest mutants lint docs
