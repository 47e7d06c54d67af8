# make demo: set up and run the main job on the built-in corpus.  make test: set up and test;
# make slow: the tests that compile or run for long, which CI runs too; make docs: the documentation in site/.
# They need Python >= 3.11, make and git only. PYTHON=/path/to/python3.x overrides the choice.

VENV ?= .venv
WORKDIR ?= demo
NEWEST := $(shell for p in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
PYTHON ?= $(NEWEST)
RUN := $(VENV)/bin/python
# One process per core. The tests of a file run in the same process and share trained models.
AT_ONCE := -n auto --dist loadfile --durations=15
# The tests of tests/multidevice need eight CPU devices, hence a pytest process of their own.
# TESTS=... (paths, options of pytest) runs only those.
define run_pytest
	$(RUN) -m pytest $(AT_ONCE) -m $(1) $(or $(TESTS),--ignore=tests/multidevice)
	$(if $(TESTS),,$(RUN) -m pytest $(AT_ONCE) -m $(1) tests/multidevice)
endef

.PHONY: demo test slow lint format install dev docs clean
demo: install
	$(RUN) -m dwt_jax demo --workdir=$(WORKDIR) $(DEMO)

test: dev
	$(call run_pytest,"not slow")

slow: dev
	$(call run_pytest,slow)

lint: dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(RUN) tools/lint_names.py

format: dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Stamps, so that a second call installs nothing.
install: $(VENV)/.run
dev: $(VENV)/.dev

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later found, say PYTHON=/path/to/python3.x" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is too old or does not run, expected Python 3.11 or later" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.python requirements.txt constraints.txt pyproject.toml
	$(RUN) -m pip install -q -c constraints.txt -r requirements.txt
	$(RUN) -m pip install -q --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(RUN) -m pip install -q -c constraints.txt -r requirements-dev.txt
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

$(VENV)/.docs: $(VENV)/.python requirements-docs.txt
	$(RUN) -m pip install -q -r requirements-docs.txt
	@touch $@

clean:
	rm -rf $(VENV)
