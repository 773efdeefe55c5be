# `make demo`, `make test` and `make test-all` need Python 3.11 or newer and nothing else: they set up .venv first.
#
# PYTHON  the interpreter that creates the environment
# VENV    where the environment lies; one that is already there is reused
# TORCH   what pip installs as torch. The version alone takes a CPU build where one is on offer; elsewhere
#         name a build's own index: make test TORCH="torch==2.13.0 --index-url URL"
# TEST_WORKERS  processes that share the test files; each test computes on one thread
PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell sed -n '/^torch==/p' constraints.txt)
TEST_SECONDS ?= 2400
TEST_WORKERS ?= 2
PYTEST_FLAGS ?=

python := $(VENV)/bin/python
pip := $(python) -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt

.PHONY: demo test test-all style quality clean

demo: $(VENV)/.installed
	$(python) -m diffusers_cf.cli demo --output demo_output

pytest := $(python) -m pytest -n $(TEST_WORKERS) --dist loadfile --session-timeout=$(TEST_SECONDS) --durations=15 $(PYTEST_FLAGS)

# what a contributor runs: minutes; test-all is everything
test: $(VENV)/.installed
	$(pytest) -m "not slow"

test-all: $(VENV)/.installed
	$(pytest)

style: $(VENV)/.installed-dev
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

quality: $(VENV)/.installed-dev
	$(python) -m ruff check .
	$(python) -m ruff format --check .

# leaves the environment alone: VENV may be one that you use elsewhere
clean:
	rm -rf demo_output build dist diffusers_cf.egg-info .pytest_cache .ruff_cache
	find diffusers_cf tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# torch first: once it is there no other package asks for its newest build, which brings gigabytes of CUDA.
# It is not among the constraints of the second step, so that another TORCH is not replaced there.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	test -x $(python) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: needs Python 3.11 or newer, see PYTHON in the Makefile")'
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	sed '/^torch==/d' constraints.txt > $(VENV)/constraints.txt
	$(pip) setuptools
	$(pip) $(TORCH)
	$(pip) --no-build-isolation -e '.[phantom,app,dicom,skull,train,test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(pip) --no-build-isolation -e '.[dev]'
	touch $@
