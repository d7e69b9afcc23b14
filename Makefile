# Both commands set everything up on a machine with Python 3.10 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
# One thread per process: what runs side by side shares the cores (README, "Threads"). glibc gives the memory of every
# large tensor back and asks for it again, page by page: here it keeps up to 1 GiB.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 \
    MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864

.PHONY: report test fuzz lowest pictures docs clean

report: .venv/.stamp
	$(BIN)/svdlab report --out reports

test: .venv/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy svdlab
	$(BIN)/lint-imports --no-cache
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not cuda and not weights"

# Damaged files for so many seconds in all, from a seed that no run had before (tests/fuzzing.py).
SECONDS ?= 300
SEED ?= $(shell date +%s)
FUZZERS = $(shell cat tests/test_fuzz_*.py | grep -c '= fuzz')
fuzz: .venv/.stamp
	SVDLAB_FUZZ_SECONDS=$$(($(SECONDS) / $(FUZZERS))) SVDLAB_FUZZ_SEED=$(SEED) $(TEST_ENV) \
	    $(BIN)/python -m pytest -rP tests/test_fuzz_*.py

# The lowest versions that pyproject.toml allows, and the tests that depend on them most; torch as it is installed.
LOWEST := .venv-lowest/bin
lowest: .venv/.stamp
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST)/python -m pip install --quiet uv
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch').split('+')[0])" > .venv-lowest/torch.txt
	$(LOWEST)/uv pip compile --quiet --python $(LOWEST)/python --resolution lowest-direct --extra dev \
	    --constraint .venv-lowest/torch.txt pyproject.toml --output-file .venv-lowest/all.txt
	grep -vE '^(nvidia-|triton)' .venv-lowest/all.txt > .venv-lowest/requirements.txt
	$(LOWEST)/python -m pip install --quiet --no-deps --requirement .venv-lowest/requirements.txt --editable .
	$(TEST_ENV) $(LOWEST)/python -m pytest -n 2 -m "not slow and not browser and not cuda and not weights" \
	    $(addprefix tests/test_,$(addsuffix .py,reading trace compare cli report widgets plots sweep video checkpoint))

# The documentation site, into site/; with the report, if there is one. It asks no other server for anything.
docs: .venv/.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The README's pictures, from a report that is made first.
pictures: report
	$(TEST_ENV) $(BIN)/python docs/make_picture.py
	$(TEST_ENV) $(BIN)/python docs/make_screenshots.py reports

.venv/.stamp: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-lowest site reports/*.html reports/*.json reports/*.xml
