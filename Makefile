# Both commands set everything up on a machine with Python 3.10 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
# One thread per process: what runs side by side shares the cores (README, "Threads").
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: report test fuzz pictures clean

report: .venv/.stamp
	$(BIN)/svdlab report --out reports

test: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy svdlab
	$(BIN)/lint-imports --no-cache
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not cuda and not weights"

# Damaged files, each kind for so many seconds, from a seed that no run had before (tests/fuzzing.py).
SECONDS ?= 60
SEED ?= $(shell date +%s)
fuzz: .venv/.stamp
	SVDLAB_FUZZ_SECONDS=$(SECONDS) SVDLAB_FUZZ_SEED=$(SEED) $(TEST_ENV) $(BIN)/python -m pytest -rP tests/test_fuzz_*.py

# The README's pictures, from a report that is made first.
pictures: report
	$(TEST_ENV) $(BIN)/python docs/make_picture.py
	$(TEST_ENV) $(BIN)/python docs/make_screenshots.py reports

.venv/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv reports/*.html reports/*.json reports/*.xml
