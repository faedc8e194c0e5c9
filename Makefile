# Python 3.11 or newer. Everything is installed into .venv, at the versions in constraints.txt.
PYTHON ?= python3
# On a machine without NVIDIA GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares the CUDA build of torch.
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup quickstart format lint test coverage test-slow bench

setup: .venv/installed            ## an environment with the package

quickstart: setup                 ## the whole path on real digits, in minutes
	$(BIN)/deit quickstart

format: .venv/installed-test      ## the layout of the code, and the mends that ruff can make
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/installed-test        ## style, types, spelling and the order of the rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

test: lint                        ## all of that, and the suite
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) suite apart

# Side by side, each on a core: threads that wait for each other would spend most of the time doing that.
.PHONY: suite apart
suite:
	$(BIN)/python -m pytest -m "not slow" --durations=20
# In processes of their own: one for each Keras back end, and TensorFlow and OpenVINO stay out of the rest of the suite.
# Of OpenVINO a signal stack remains, too small for what a signal handler of Python needs afterwards.
apart:
	$(BIN)/python -m pytest -m "not slow" tests/runtimes
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -m "not slow" tests/twin
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m "not slow" tests/twin

coverage: .venv/installed-test    ## the lines of the package that the suite runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --cov --cov-report=term --no-cov-on-fail

test-slow: .venv/installed-test   ## the checks that take minutes each
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -m slow tests/runtimes
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m slow tests/twin

bench: .venv/installed-bench      ## speed beside timm, transformers and keras-hub; wants a quiet machine
	$(BIN)/python -m bench.speed.train
	$(BIN)/python -m bench.speed.keras
	$(BIN)/python -m bench.speed.predict

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deit needs Python 3.11 or newer, found %d.%d; run make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) torch torchvision)
	$(INSTALL) --editable '.[hub,quickstart]'
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) --upgrade 'pip>=25.1'  # knows dependency groups
	$(INSTALL) --editable '.[export,hub,keras,parquet,quickstart,serve,teachers]' --group dev
	touch $@

# keras-hub asks for tensorflow-text, which brings a second TensorFlow, and more that its DeiT works without.
.venv/installed-bench: .venv/installed-test
	$(INSTALL) --no-deps keras-hub
	touch $@
