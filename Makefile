# Every install obeys constraints.txt, the build environment's too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1

PYTHON ?= python3
BIN := .venv/bin
OUT ?= tying-out

.PHONY: run test check format lint types bench-mnist bench-compact bench-stage-one bench-max-drop bench-prox bench-selection bench-ties \
	bench-align bench-soft bench-bundle bench-two-domains bench-hybrid clean

run: .venv/.run ## Set up, then compress the embedded task: prints the table and where the page is
	$(BIN)/tying compress --max-drop 0.003 --out $(OUT)

test: .venv/.dev ## Set up, then run all tests, doctests and examples
	$(BIN)/python -m pytest -n 2 --doctest-modules src tests

check: lint types test ## What a change must pass

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/.dev
	$(BIN)/pyright

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-mnist: .venv/.dev ## Under an hour on two cores; goes on where it was after Ctrl-C
	$(BIN)/python -m benchmarks.mnist

bench-max-drop: .venv/.dev
	$(BIN)/python -m benchmarks.max_drop

bench-compact: .venv/.dev
	$(BIN)/python -m benchmarks.compact_speed

bench-stage-one: .venv/.dev
	$(BIN)/python -m benchmarks.stage_one_cost

bench-prox: .venv/.dev ## A quarter of an hour on a quiet machine
	$(BIN)/python -m benchmarks.prox

bench-selection: .venv/.dev
	$(BIN)/python -m benchmarks.selection

bench-ties: .venv/.dev ## A few minutes; what else it tries out (torch-pruning, PEFT) is installed beside
	$(BIN)/python -m pip install --quiet torch-pruning==1.6.1 peft
	$(BIN)/python -m benchmarks.ties

bench-align: .venv/.dev ## A quarter of an hour
	$(BIN)/python -m benchmarks.align

bench-soft: .venv/.dev
	$(BIN)/python -m benchmarks.soft

bench-bundle: .venv/.dev
	$(BIN)/python -m benchmarks.bundle

bench-two-domains: .venv/.dev ## A quarter of an hour; goes on where it was after Ctrl-C
	$(BIN)/python -m benchmarks.two_domains

bench-hybrid: .venv/.dev ## A quarter of an hour
	$(BIN)/python -m benchmarks.hybrid

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[report]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ .venv/.run

clean:
	rm -rf .venv $(OUT)
