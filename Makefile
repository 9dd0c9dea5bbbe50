# Two commands: `make train` and `make test`. Both make the environment in .venv on the first call.
WORKERS ?= 2
ARGS ?=
RUNS ?= 60
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

INSTALLED := .venv/.installed

.PHONY: train test explain chaos check bench gpu clean

train: $(INSTALLED)
	WORKERS='$(WORKERS)' launch/local.sh $(ARGS)

test: $(INSTALLED)
	python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# How one step of minibatch gradient descent updates the weights for each example: on the terminal and in explain.html
explain: $(INSTALLED)
	python -m mbgd explain data=digits batch.size=4 $(ARGS)

# Seeded schedules of whatever may happen; RUNS=1000 goes on where it was stopped (runs/chaos.jsonl).
chaos: $(INSTALLED)
	MBGD_CHAOS_RUNS=60 python -m pytest tests/test_hangs.py tests/test_shared_memory.py tests/test_multinode.py
	python tests/chaos.py --runs $(RUNS) --results benchmarks/results/chaos.txt
	python tests/survivors.py --runs $(RUNS) --results benchmarks/results/chaos_recovery.txt

check: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy

bench: $(INSTALLED)
	python benchmarks/order.py
	python benchmarks/step.py
	python benchmarks/step_parts.py
	python benchmarks/startup.py
	python benchmarks/averaging.py
	python benchmarks/allreduce.py
	python benchmarks/many_workers.py
	python benchmarks/checkpoint.py
	python benchmarks/memory.py
	python benchmarks/checks.py
	python benchmarks/recomputing.py
	python benchmarks/tracking.py
	python benchmarks/experiments.py

# On a machine with a GPU, in under 9 minutes and without a network once .venv is there (benchmarks/gpu_setup.sh); on
# others what a CPU can run of it. The benchmarks run even where a test fails. INT: where the time is over, pytest still
# tells what has failed by then.
gpu: $(INSTALLED)
	timeout --signal=INT --kill-after=10 300 python -m pytest --durations=15 tests/test_gpu.py tests/test_gpu_ready.py; \
	tests=$$?; \
	timeout 230 python benchmarks/gpu.py && exit $$tests

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# torch first and pinned: the build that the tests ran with
	python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv
