# `make figures` and `make test` do everything on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/
INSTALLED = $(VENV)/installed

figures: $(INSTALLED)
	$(RUN)linfit figures --out output

test: $(INSTALLED)
	$(RUN)python -m pytest
	$(RUN)python -m pytest --float32 -m numerical

# Tests that finish in about two minutes, for everyday work.
quick: $(INSTALLED)
	$(RUN)python -m pytest -m "not slow"

bench: $(INSTALLED)
	OPENBLAS_NUM_THREADS=1 NPROC=4 $(RUN)python -m pytest benchmarks --benchmark-columns=median,min,rounds --benchmark-sort=name

lint: $(INSTALLED)
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)lint-imports

docs: $(INSTALLED)
	$(RUN)python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(RUN)sphinx-build -W --keep-going docs output/docs

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(INSTALLED)

.PHONY: figures test quick bench lint docs
