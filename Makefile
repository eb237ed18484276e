# Every target sets itself up: it needs Python 3.11 or newer with venv, make and git, nothing else.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
# Hundreds of processes start from this source tree: they need its bytecode.
unexport PYTHONDONTWRITEBYTECODE
# Three processes of tests for two cores: many tests wait for servers, or for a time to pass.
PARALLEL := -n 3 --dist loadgroup --no-loadscope-reorder
PARALLEL_SLOW := -n 2 --dist loadgroup --no-loadscope-reorder
# The browser that the page's tests drive; where it cannot be fetched, only they fail.
BROWSER := .cache/browser/chromium-153.0.0/chromium
PACKAGES := ./core $(patsubst %/pyproject.toml,./%,$(wildcard plugins/*/pyproject.toml))
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs bench new-plugin clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## ask the small model that the project ships about a picture it has never seen
	$(BIN)/python zoo/demo.py

test: $(READY) $(BROWSER)  ## the tests that need neither a GPU nor the network
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(READY) $(BROWSER)  ## the tests that take minutes
	$(BIN)/python -m pytest $(PARALLEL_SLOW) -m "slow and not gpu and not network"

lint: $(READY)  ## ruff, mypy --strict, and the layers of the architecture
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DOCS_READY)  ## build the documentation site into site/
	$(BIN)/mkdocs build --strict

bench: $(READY)  ## compare with transformers on this machine's CPU
	$(BIN)/python tests/bench/cpu_vs_transformers.py

new-plugin: $(READY)  ## write a working plugin to begin from: make new-plugin NAME=myfamily
	$(BIN)/mm new-plugin "$(NAME)" --directory plugins

clean:  ## remove the virtual environment and everything that was built
	rm -rf $(VENV) build dist site .out .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(READY): requirements-dev.txt constraints-dev.txt core/pyproject.toml $(wildcard plugins/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11. Run: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the workspace into $(VENV) (some minutes the first time)"
	$(PIP) install -c constraints-dev.txt -r requirements-dev.txt $(addprefix -e ,$(PACKAGES))
	@touch $@

$(BROWSER): tests/support/browser.py | $(READY)
	-$(BIN)/python tests/support/browser.py

$(DOCS_READY): $(READY) requirements-docs.txt
	$(PIP) install -c constraints-dev.txt -r requirements-docs.txt
	@touch $@
