# Two commands: `make demo` and `make test`. Both make .venv with the locked versions first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fast test-cluster lint clean distclean

help:
	@echo "make demo       install, then grow the starter's LLM by four modalities with MERA"
	@echo "make test       install, then run the whole test suite"
	@echo "make test-fast  the suite without its slow tests"
	@echo "make test-cluster  PostgreSQL, S3, Prefect, MLflow and two workers on this machine"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove what tests and tools leave behind"
	@echo "make distclean  also remove .venv, artifacts, mlruns and the Prefect database"

# The third line brings the libraries of a CUDA build of torch, which no lock for all machines can name.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --constraint requirements.lock torch
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: $(STAMP)
	$(BIN)/graftline run params/starter.yaml

# Two files of tests at a time, a thread each: more threads than cores slow each other down. On CPU,
# whose bits the tests compare: `.venv/bin/python -m pytest -m gpu`, called directly, sees the GPU.
ON_CPU := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTEST := $(ON_CPU) --numprocesses 2 --dist loadfile

test: $(STAMP)
	$(PYTEST) --ignore tests/cluster

test-fast: $(STAMP)
	$(PYTEST) --ignore tests/cluster -m "not slow"

# Its servers and workers want the machine for themselves.
test-cluster: $(STAMP)
	$(ON_CPU) tests/cluster $(TRY)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv artifacts mlruns .prefect
