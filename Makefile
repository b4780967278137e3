# Everything runs in a virtual environment of its own, .venv; the first target that needs it makes it.
PYTHON ?= python3
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INTEROP := .venv-interop

.PHONY: quickstart test test-slow lint types schemas gpu-rows benchmarks interop clean

# The whole job on an embedded example: corpus, target, cache, draft, report. Run it again to resume.
quickstart: $(READY)
	$(BIN)/eagle-offline quickstart --work quickstart

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES)

# Full fault injection and the long proofs.
test-slow: $(READY)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) -m "slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# The JSON Schemas, from the code.
schemas: $(READY)
	$(BIN)/python -m eagle_offline.schemas_from_code schemas

# Every gpu test, then every benchmark's gpu rows, shortest first; each row is written as it ends, so run it again.
# PYTHON is used as it is, since a machine with a GPU brings its own torch.
gpu-rows:
	$(PYTHON) -m benchmarks.gpu_rows

# Rows of every benchmark on this machine's CPU.
benchmarks: $(READY)
	$(BIN)/python -m benchmarks.run --all

# Exports loaded by the speculators library, which gets an environment of its own, and its logits beside ours.
interop: $(READY) $(INTEROP)/.ready
	INTEROP_PYTHON=$(INTEROP)/bin/python $(BIN)/python -m benchmarks.run interop

$(INTEROP)/.ready: Makefile
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(INTEROP)/bin/python -m pip install --quiet "torch==$$($(INTEROP)/bin/python -c 'import torch; print(torch.__version__.split("+")[0])')" speculators==0.9.0
	$(INTEROP)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) $(INTEROP) quickstart
