# SPDX-License-Identifier: LGPL-2.1-or-later
# `make run` and `make test` set up all they need: Debian packages by apt (as root; else they print the line and
# stop), Python packages into .venv. Nothing outside this folder is changed but for those Debian packages.

PYTHON ?= $(shell tools/python.sh)
VENV := .venv
BIN := $(VENV)/bin
# tests side by side: each may start an emulated host, which takes a processor and 300 MiB
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
DESTDIR ?=
PREFIX ?= /usr
# the Python that runs what `make install` installs; it needs cffi's backend and systemd-python (README)
RUN_PYTHON ?= /usr/bin/python3
BUILD ?= build/install
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml meson.build $(shell find kvmneg csrc man completion units -type f ! -name '*.pyc' ! -name '*.so' ! -name '_x86_64*' 2>/dev/null)

.PHONY: run test test-hosts test-long lint bench build install clean setup-run setup-install setup-test setup-hosts
.DELETE_ON_ERROR:

run: setup-run build  ## the main job on this host, narrated
	@$(BIN)/python -P -m kvmneg.cli.demo

test: setup-test build $(VENV)/.test  ## all tests, linters included, in two emulated hosts too; PYTEST_ARGS= for a part
	@$(BIN)/python -m tests.hosts build few || echo "the tests that need those hosts are skipped" >&2
	@$(BIN)/python -m tests.units trixie || echo "the tests that need a systemd of their own are skipped" >&2
	@$(BIN)/pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-hosts: setup-hosts build $(VENV)/.test  ## the tests that run in emulated hosts or under other systemds, in all of them
	@$(BIN)/python -m tests.units || echo "the tests that need a systemd of their own are skipped" >&2
	@$(BIN)/pytest -o faulthandler_timeout=1200 -m hosts --hosts=all tests $(PYTEST_ARGS)

test-long: setup-test build $(VENV)/.test  ## kills, soaks and properties with many more examples
	@$(BIN)/pytest -o faulthandler_timeout=3600 --long $(PYTEST_ARGS)

lint: setup-test build $(VENV)/.test  ## the linters alone
	@$(BIN)/pytest tests/lint $(PYTEST_ARGS)

bench: setup-test build $(VENV)/.test $(VENV)/.bench  ## every figure with its target; KVMNEG_BENCH_STATE= for the state directory
	@$(BIN)/python -P -c "import runpy, sys; sys.path.append('.'); runpy.run_module('bench', run_name='__main__')"

build: $(VENV)/.built

# The installed commands name RUN_PYTHON, not this folder's: a service sees no home, and .venv may go.
install: setup-install $(VENV)/.install  ## libraries, headers, the Python package, commands, pages, completions, units, below DESTDIR
	@rm -rf '$(BUILD)' && mkdir -p '$(dir $(BUILD))'
	@packages=$$($(RUN_PYTHON) tools/site_packages.py '$(PREFIX)') && \
	    PATH="$(abspath $(BIN)):$$PATH" $(BIN)/meson setup --buildtype=release --prefix='$(PREFIX)' --libexecdir=libexec \
	    -Dinterpreter='$(RUN_PYTHON)' -Dpython.purelibdir="$$packages" -Dpython.platlibdir="$$packages" \
	    -Dclient=enabled -Dman=enabled -Dcompletion=enabled '$(BUILD)' >$(BUILD).log 2>&1 || { cat $(BUILD).log >&2; exit 1; }
	@$(BIN)/meson install --quiet -C '$(BUILD)' --destdir '$(abspath $(DESTDIR))'

clean:
	rm -rf build .venv

setup-run setup-install setup-test setup-hosts:
	@tools/setup.sh $(@:setup-%=%)

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml tools/constraints.txt | $(BIN)/python
	@echo "Python packages (once) …"
	@$(PIP) install --use-pep517 --constraint tools/constraints.txt $$($(BIN)/python tools/dependencies.py build run)
	@touch $@

$(VENV)/.install: $(VENV)/.run
	@$(PIP) install --use-pep517 --constraint tools/constraints.txt $$($(BIN)/python tools/dependencies.py install)
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@$(PIP) install --use-pep517 --constraint tools/constraints.txt $$($(BIN)/python tools/dependencies.py test lint)
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(PIP) install --use-pep517 --constraint tools/constraints.txt $$($(BIN)/python tools/dependencies.py bench)
	@touch $@

# a plain install, not an editable one: that would rebuild at import and cost start-up time
$(VENV)/.built: $(VENV)/.run $(SOURCES)
	@echo "building …"
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation --no-deps --force-reinstall .
	@touch $@
