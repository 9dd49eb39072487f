# Yuanzhen 远诊. `make up` starts everything and runs the demonstration; `make test` checks everything.
# Needs Python 3.11 or newer with venv, and npm. Both work from a fresh clone.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
ASSETS := .cache/assets/complete.txt

.DEFAULT_GOAL := help
.PHONY: help setup up down status clean distclean test lint format lock peers docs
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /  make \1\t/' | expand -t 20

# The lock names every version. The package itself is installed in place, built with the locked setuptools.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing Python packages (some minutes the first time)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(ASSETS): $(STAMP) deploy/assets.py deploy/fonts.py
	@$(BIN)/yuanzhen setup
	@touch $@

setup: $(STAMP) $(ASSETS) ## Python packages, viewer, fonts, demonstration data

up: setup ## start the system on this machine and run the demonstration
	@$(BIN)/yuanzhen up --demo

down: $(STAMP) ## stop it
	@$(BIN)/yuanzhen down

status: $(STAMP) ## what runs
	@$(BIN)/yuanzhen status

clean: $(STAMP) ## forget all data of this machine's system (var/)
	@$(BIN)/yuanzhen clean

distclean: clean ## forget packages and downloads too
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

lint: $(STAMP) ## ruff, mypy, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP) ## let ruff write the layout
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

peers: $(STAMP) ## programs from Debian that tests talk to
	@$(BIN)/python -m tests.peers

test: setup peers lint ## everything that CI checks
	@$(BIN)/python -m pytest

docs: $(STAMP) ## documents that are made from code
	@$(BIN)/yuanzhen settings > docs/settings.md

lock: $(STAMP) ## write requirements.lock from what is installed
	@$(BIN)/python -m deploy.lock > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@touch $(STAMP)
