# Everything works right after a clone. Needed: git, make, Python 3.11 or newer with venv, and a package index.

VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help serve demo test test-all lint format check bench compare guard torture docs build clean

help:
	@echo 'make serve    run the broker on port 8080, with a PostgreSQL of its own    (ARGS="--port 9090 …")'
	@echo 'make demo     watch events go through it'
	@echo 'make test     run the quick tests: five minutes                             (ARGS="tests/test_facts.py -x")'
	@echo 'make test-all run all tests: fifteen minutes'
	@echo 'make lint     ruff, mypy and the import contracts'
	@echo 'make check    lint and test-all'
	@echo 'make format   let ruff format and repair what it can'
	@echo 'make bench    measure against bare asyncpg                                  (ARGS="--rounds 3")'
	@echo 'make guard    count instructions against an old commit: two minutes         (ARGS="--against COMMIT")'
	@echo 'make compare  measure beside its peers: ten minutes                          (ARGS="--systems bare,pgbackend")'
	@echo 'make torture  kill, freeze and cut off everything, and check every promise  (ARGS="--minutes 10")'
	@echo 'make docs     the documentation site: open site/index.html'
	@echo 'make build    wheel and sdist in dist/'

serve: $(VENV)/.ready
	@exec $(BIN)/python examples/receiver.py -- $(BIN)/pgbackend serve --config examples/broker.yaml $(ARGS)

demo: $(VENV)/.ready
	@exec $(BIN)/python examples/demo.py $(ARGS)

# Bytecode is kept, whatever the environment says: without it every process that the tests start takes a second longer.
test: $(VENV)/.ready
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal --quick $(ARGS)

test-all: $(VENV)/.ready
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.ready
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: lint test-all

format: $(VENV)/.ready
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

bench: $(VENV)/.ready
	@exec $(BIN)/pgbackend bench $(ARGS)

guard: $(VENV)/.ready
	@exec $(BIN)/python benchmarks/guard.py $(ARGS)

compare: $(VENV)/.bench
	@exec $(BIN)/python -m benchmarks.compare $(ARGS)

torture: $(VENV)/.ready
	@exec $(BIN)/pgbackend torture $(ARGS)

# The theme announces a later MkDocs in colour, unless it is told not to.
docs: $(VENV)/.ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo 'The site is in site/: open site/index.html.'

build: $(VENV)/.ready
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Installed once, and again when pyproject.toml changed. A .venv whose Python is gone is made anew.
$(VENV)/.ready: pyproject.toml
	@if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  for python in python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      found=$$python; break; \
	    fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo 'pgbackend needs Python 3.11 or newer with its venv module (Debian, Ubuntu: apt-get install python3-venv).' >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up $(VENV) with $$($$found --version); the first time takes a minute."; \
	  $$found -m venv --clear $(VENV); \
	fi
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --root-user-action=ignore --editable '.[dev]'
	@touch $@

# The peers' clients, which nothing else needs.
$(VENV)/.bench: $(VENV)/.ready
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --root-user-action=ignore --editable '.[bench]'
	@touch $@
