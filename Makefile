# Everything runs in .venv, which is built once and again only when the pinned versions change.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONPATH := $(CURDIR)

.PHONY: demo test slow check setup clean
setup: .venv/.ready

.venv/.ready: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; say which with: make PYTHON=python3.12 $(MAKECMDGOALS)"; rm -rf .venv; exit 2; }
	@echo "Installing the pinned packages into .venv (once; torch alone is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev,align]'
	@touch $@

demo: setup  ## the main job on the shipped images and weights, one to four minutes on two cores
	@$(BIN)/diffusionclip demo

test: setup  ## the whole test suite but for what takes minutes, two files of tests side by side
	$(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25

slow: setup  ## networks of real size with random weights, kills and lost nodes: three quarters of an hour on two cores
	$(BIN)/python -m pytest -m slow

check: setup  ## linter, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv out build
