# Everything runs in .venv, which every target makes and fills if need be.

PYTHON ?= python3
# A machine with another CUDA wants another build: make test TORCH="torch==2.13.0 --index-url https://..."
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := outputs/quickstart

.PHONY: test quickstart lint format build clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart/run.py --output_dir $(QUICKSTART)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(INSTALLED)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) outputs build dist *.egg-info
