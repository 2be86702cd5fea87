# make passkey   train a small Mamba on passkey retrieval, sweep length x depth, show the result
# make test      the tests
# make compare   the same sweep for all architectures, and what each costs
# Each sets up what it needs first: a virtual environment in .venv.

PYTHON ?= python3
BIN := .venv/bin
# With the compilers of the extra `check`, JAX looks for their devices, and prints a page about each that is not there.
export JAX_PLATFORMS ?= $(if $(wildcard /dev/nvidia0 /dev/accel0 /dev/vfio/0),,cpu)

.PHONY: passkey compare test setup clean

passkey: .venv/installed
	$(BIN)/python -m experiments.sweep --sweep=experiments/sweeps/passkey.py:mamba --workdir=runs/passkey

compare: .venv/installed
	$(BIN)/python -m experiments.sweep --sweep=experiments/sweeps/passkey.py --workdir=runs/comparison
	$(BIN)/python -m experiments.costs --sweep=experiments/sweeps/passkey.py --workdir=runs/comparison

# One process per core; programs compiled by one test are reused by the others through a cache that lives for the run.
test: .venv/installed-for-tests
	@cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && \
	JAX_COMPILATION_CACHE_DIR="$$cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal

setup: .venv/installed

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing); lcr needs Python 3.12 or newer."; \
	  echo "With pyenv: pyenv install 3.12 (this folder's .python-version then picks it)."; \
	  echo "Otherwise: install python3.12 and its venv package, then: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/installed-for-tests: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[check]' || \
	  echo "No compilers for GPUs and TPUs could be installed: the tests that need them are skipped."
	@touch .venv/installed $@

clean:
	rm -rf .venv build *.egg-info
