# Verbs of one line each. `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test faults lint clean

install: .venv/installed

.venv/installed: pyproject.toml CMakeLists.txt $(wildcard native/* native/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/cenacle demo --nodes 2

test: install lint
	$(BIN)/pytest

faults: install
	$(BIN)/python benchmarks/faults.py

lint: install
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
