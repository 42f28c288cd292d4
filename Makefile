# Verbs of one line each. `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test faults soak lint docs load fuzz clean

install: .venv/installed

.venv/installed: pyproject.toml CMakeLists.txt $(wildcard native/* native/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/cenacle demo --nodes 2

# In three processes, a file in one of them: tests that start several ranks often wait for them.
# Then hosts alone: their network namespaces have deadlines of seconds.
test: install lint
	MAKEFLAGS= $(BIN)/pytest -p no:cacheprovider --numprocesses 3 --dist loadfile --no-loadscope-reorder \
	  tests/ranks tests/browser tests/mlx tests/unit
	MAKEFLAGS= $(BIN)/pytest -p no:cacheprovider tests/hosts

# What failures cost: each ten times, an hour in all; and an hour with a fault every minute.
faults: install
	$(BIN)/python benchmarks/faults.py

soak: install
	$(BIN)/python benchmarks/soak.py

lint: install
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/mypy

# docs/cli.md, from the program itself.
docs: install
	$(BIN)/python tools/write_cli_docs.py

# Several people at once, and bodies that are wrong; NODES=2 for two nodes.
NODES ?= 1
load: install
	$(BIN)/python benchmarks/load.py --nodes $(NODES)

fuzz: install
	$(BIN)/python benchmarks/fuzz.py --nodes $(NODES) --schema 100

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
