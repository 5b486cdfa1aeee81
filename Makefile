# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0
export RAY_USAGE_STATS_ENABLED ?= 0
.PHONY: help install demo serve test nodes lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1@\2/' | column -t -s '@'

install: .venv/installed  ## .venv with the pinned dependencies and this package

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv .venv
	@echo "installing about 1.5 GB of pinned dependencies; a few minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## the whole pipeline on the toy city: data, training, accuracy table, report
	$(BIN)/python ray_jobs/train.py --config demo --evaluate
	@echo
	@echo "next: make serve                                 # the model on a web page"
	@echo "      . .venv/bin/activate"
	@echo "      python ray_jobs/train.py --config my_city.yaml --evaluate   # your city: README, 'Your own city'"

serve: install  ## the page with the model trained last, on this machine
	@$(BIN)/python -m serve

test: install lint  ## format, lint, types and all tests but those of `make nodes`
	$(BIN)/python -m pytest -q -m "not nodes" -n 2 --dist loadgroup   # what needs Ray are two groups: a Ray for each

nodes: install  ## tests with several Ray nodes, and those that take a minute each
	$(BIN)/python -m pytest -q -m nodes

lint: install  ## ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove .venv and all runs
	rm -rf .venv runs
