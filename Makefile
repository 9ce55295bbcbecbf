# Every install obeys constraints.txt, the build environment's too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1

PYTHON ?= python3
BIN := .venv/bin
OUT ?= tying-out

.PHONY: run test check format lint types bench-mnist bench-compact bench-stage-one bench-max-drop bench-prox bench-selection bench-ties \
	bench-align bench-soft bench-bundle bench-two-domains bench-hybrid bench-lenet bench-resnet20 bench-vgg16 bench-sharing \
	bench-stage-two-memory bench-conv bench-resnet50 bench-channels clean

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

bench-lenet: .venv/.dev ## An hour and a half on two cores; goes on where it was after Ctrl-C
	$(BIN)/python -m benchmarks.lenet

bench-resnet20: .venv/.dev ## Two hours on a core; goes on where it was after Ctrl-C
	$(BIN)/python -m benchmarks.resnet20

bench-vgg16: .venv/.dev ## For a GPU; make bench-vgg16 ARGS=--smoke runs a minute on a CPU
	$(BIN)/python -m benchmarks.vgg16_cifar10 $(ARGS)

bench-sharing: .venv/.dev ## A quarter of an hour; goes on where it was after Ctrl-C
	$(BIN)/python -m benchmarks.sharing

bench-stage-two-memory: .venv/.dev ## Ten minutes, on Linux
	$(BIN)/python -m benchmarks.stage_two_memory

bench-conv: .venv/.dev ## Two minutes on a quiet machine
	$(BIN)/python -m benchmarks.conv_speed

bench-resnet50: .venv/.dev ## Five minutes on a quiet machine
	$(BIN)/python -m benchmarks.resnet50_speed

bench-channels: .venv/.dev ## An hour on two cores
	$(BIN)/python -m pip install --quiet torch-pruning==1.6.1
	$(BIN)/python -m benchmarks.channels

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
