# make demo && make test: all that is needed is Python 3.11 to 3.13 and this make
PYTHON ?= python3
BIN = .venv/bin
UV ?= $(or $(shell command -v uv),$(BIN)/uv)
COMPILE = $(UV) pip compile --quiet --generate-hashes --universal --python-version 3.11 --custom-compile-command "make lock"
# Two processes that take the files in their order: by number of tests, the few that take longest would come last and alone
APART = -n 2 --dist loadfile --no-loadscope-reorder
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help env demo test test-stats bench lock notebooks clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

env: ## Build .venv from the lock, or see that it is up to date
	@$(PYTHON) bootstrap.py

demo: env ## One whole retraining cycle on real flights, in this folder
	$(BIN)/retrain-nb init . --demo flights
	$(BIN)/retrain-nb cycle --now 2013-06-01

test: env ## Lint, types, every notebook, every test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/nbdev-test nbs
	$(BIN)/python -m pytest $(APART)

test-stats: env ## The error rates over all repetitions, as a table (RETRAIN_NB_SEED=7 for other ones)
	$(BIN)/python -m pytest -m stats tests/test_error_rates.py -n 2 --dist load

bench: env ## What a recorded run costs over a plain script, as ratios
	$(BIN)/python -m bench

lock: ## Resolve pyproject.toml again (UPGRADE=--upgrade for newer versions)
	$(COMPILE) $(UPGRADE) --extra demo --extra dev pyproject.toml --output-file requirements.lock
	echo uv | $(COMPILE) $(UPGRADE) - --output-file bootstrap.lock

notebooks: env ## Write the modules and README.md from the notebooks, and clean the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb > README.md

clean: ## Remove .venv and every cache; runs and reports stay
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
