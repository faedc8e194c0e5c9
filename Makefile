# Needs Python 3.11 or newer. Everything is installed into .venv, with the versions in constraints.txt.
PYTHON ?= python3
# Without an NVIDIA GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids the CUDA build of torch.
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup quickstart format lint test coverage test-slow docs docs-links bench fortress gpu gpu-cifar10

setup: .venv/installed            ## create .venv with the package

quickstart: setup                 ## run the whole path on real digits, in minutes
	$(BIN)/deit quickstart

format: .venv/installed-test      ## lay out the code, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/installed-test        ## check style, types, spelling and the order of the rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

test: lint                        ## run make lint, then the test suite
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) trainings others apart

# Two of them run side by side with one thread each, because more threads would mostly wait for each other.
.PHONY: trainings others apart
TRAININGS := tests/fit tests/processes tests/serve tests/train
trainings:
	$(BIN)/python -m pytest -m "not slow" --durations=20 $(TRAININGS)
others:
	$(BIN)/python -m pytest -m "not slow" --durations=20 $(TRAININGS:%=--ignore=%)
# These run in processes of their own. Each Keras back end needs one, and TensorFlow and OpenVINO must stay out of the
# rest of the suite: OpenVINO leaves a signal stack behind that is too small for Python's signal handlers.
apart:
	$(BIN)/python -m pytest -m "not slow" tests/runtimes
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -m "not slow" tests/twin
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m "not slow" tests/twin

coverage: .venv/installed-test    ## show which lines of the package the suite runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --cov --cov-report=term --no-cov-on-fail

test-slow: .venv/installed-clients  ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -m slow tests/runtimes
	KERAS_BACKEND=jax $(BIN)/python -m pytest -m slow tests/twin

docs: .venv/installed-docs        ## make a site of docs/, without any warning, in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

docs-links: .venv/installed-docs  ## try the site's links to other sites; needs a network
	$(BIN)/python -m sphinx -b linkcheck docs docs/_build/links

bench: .venv/installed-bench      ## compare the speed with timm, transformers and keras-hub; needs a quiet machine
	$(BIN)/python -m bench.speed.train
	$(BIN)/python -m bench.speed.memory
	$(BIN)/python -m bench.speed.reading
	$(BIN)/python -m bench.speed.keras
	$(BIN)/python -m bench.speed.predict
	$(BIN)/python -m bench.speed

fortress: .venv/installed-attacks ## attack everything for an hour, and put the figures into docs/security.md
	$(BIN)/python -m bench.fortress --write

gpu:                              ## try everything on an NVIDIA GPU, in ten minutes, with the Python and PyTorch there are
	PYTHONPATH=src $(PYTHON) -m bench.gpu --records bench/gpu/records.jsonl

gpu-cifar10:                      ## train cifar10_gpu_teacher and cifar10_gpu on make CIFAR=FOLDER, in ten minutes
	PYTHONPATH=src $(PYTHON) -m deit train cifar10_gpu_teacher --data $(CIFAR) --out runs/cifar10_gpu_teacher --time 125s
	PYTHONPATH=src $(PYTHON) -m deit train cifar10_gpu --data $(CIFAR) --out runs/cifar10_gpu --time 340s
	PYTHONPATH=src $(PYTHON) -m deit eval runs/cifar10_gpu/model --data $(CIFAR)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deit needs Python 3.11 or newer, found %d.%d; run make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) torch torchvision)
	$(INSTALL) --editable '.[hub,quickstart]'
	touch $@

.venv/installed-test: .venv/installed
	$(INSTALL) --upgrade 'pip>=25.1'  # the first version with dependency groups
	$(INSTALL) --editable '.[export,fit,hub,keras,parquet,serve]' --group dev
	touch $@

.venv/installed-docs: .venv/installed
	$(INSTALL) --upgrade 'pip>=25.1'  # the first version with dependency groups
	$(INSTALL) --group docs
	touch $@

.venv/installed-attacks: .venv/installed-test
	$(INSTALL) --group attacks
	touch $@

.venv/installed-clients: .venv/installed-attacks
	$(INSTALL) --group clients --group docs --group examples --group release
	touch $@

# --no-deps, because keras-hub requires tensorflow-text (which brings a second TensorFlow) and more. Its DeiT does
# without them.
.venv/installed-bench: .venv/installed-test
	$(INSTALL) --no-deps keras-hub
	touch $@
