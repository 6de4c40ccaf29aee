# Two environments: VENV has everything, RUNTIME_VENV only what prediction needs, to prove that it suffices.
# PyTorch's CPU build is found for Python 3.11 on the project's machines; elsewhere see the README.
PYTHON ?= python3
VENV ?= .venv
RUNTIME_VENV ?= .venv-runtime
STORES_VENV ?= .venv-stores
TARGET ?= runtime-cpu train

BIN := $(abspath $(VENV))/bin
BUNDLE := $(CURDIR)/build/test-bundle

.PHONY: install stores demo test lint types check-install benchmark results reliability batch fuzz gpu-check clean
.DELETE_ON_ERROR:

install: $(VENV)/stamp

# The stamps keep every later `make` off the network until what is installed changes.
$(VENV)/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[cpu,geo,train,export,openvino,dev]'
	touch $@

$(RUNTIME_VENV)/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RUNTIME_VENV)
	$(RUNTIME_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[cpu,encoder]' pytest pytest-timeout
	touch $@

# Emulators of object stores for tests/runtime/batch/test_stores.py, whose pins are none of ours.
stores: $(STORES_VENV)/stamp

$(STORES_VENV)/stamp:
	$(PYTHON) -m venv $(STORES_VENV)
	$(STORES_VENV)/bin/python -m pip install --quiet 'moto[s3]==5.2.5' flask==3.1.3 flask-cors==6.0.5 \
		gcp-storage-emulator==2026.7.19
	touch $@

demo: install
	rm -rf demo
	$(BIN)/topt-deploy sample --out demo/
	cd demo && $(BIN)/topt-deploy train --preset quick
	cd demo && $(BIN)/topt-deploy export --format onnx
	cd demo && $(BIN)/topt-run predict regions.parquet

# The first run leaves a bundle that the second, without PyTorch, predicts from. One thread per worker: two
# that each take every core are slower than one. confcutdir: tests/conftest.py may need what only VENV has.
test: install stores $(RUNTIME_VENV)/stamp
	rm -rf $(BUNDLE)
	OMP_NUM_THREADS=1 TOPT_KEEP_BUNDLE=$(BUNDLE) TOPT_MOTO_SERVER=$(abspath $(STORES_VENV))/bin/moto_server \
		TOPT_GCS_EMULATOR=$(abspath $(STORES_VENV))/bin/gcp-storage-emulator $(VENV)/bin/pytest -n 2 --ignore=tests/runtime_only
	TOPT_TEST_BUNDLE_DIR=$(BUNDLE) $(RUNTIME_VENV)/bin/pytest --confcutdir=tests/runtime_only tests/runtime_only

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

check-install:
	PYTHON=$(PYTHON) scripts/check-install.sh build/install $(TARGET)

clean:
	rm -rf $(VENV) $(RUNTIME_VENV) $(STORES_VENV) build demo *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# Where the clones of the two research repositories are; the defaults are the development machines'.
HAFUSION ?= ../shared/data/HAFusion
PROMPT4RE ?= ../shared/data/Prompt4RE

benchmark: install
	$(BIN)/python benchmarks/chicago.py --hafusion $(HAFUSION) --prompt4re $(PROMPT4RE)

# Into docs/reliability.md: kills and full disks at length (half an hour), and many small cities (half an hour, quiet).
reliability: install
	$(BIN)/python benchmarks/reliability.py

batch: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/batch.py

# What is promised of a GPU, wherever there is one with PyTorch: nine minutes at most, nothing is installed (docs/gpu.md).
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --write-docs

# Every night: 60 seconds a target.
fuzz: install
	TOPT_FUZZ_SECONDS=60 $(BIN)/pytest --timeout=0 tests/fuzz

# docs/results.md: every protocol, variant and baseline. Hours; goes on where it was stopped.
results: install
	$(BIN)/python benchmarks/results.py --hafusion $(HAFUSION) --prompt4re $(PROMPT4RE)
