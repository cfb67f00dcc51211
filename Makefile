# make quickstart   the main job in under four minutes on two CPU cores, without a download beyond the packages
# make preferences  DPO on what the quickstart made (made first, where it is not there)
# make reinforcement   PPO and GRPO, from a reward model, likewise
# make compare      would a better prompt have done? the quickstart's base and tuned model (made first, where not there)
# make test         every test
# Both make .venv first, and only once. PYTHON may name another interpreter (3.11 to 3.13).

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
TORCH := torch==2.13.0
LIBTPU := libtpu==0.0.51

.PHONY: setup quickstart preferences reinforcement compare test lint types clean

setup: .venv/.installed

quickstart: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run.sh

preferences: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/preferences/run.sh

reinforcement: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/preferences/reinforcement.sh

compare: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/compare/run.sh

test: .venv/.installed-test
	PYTHONPATH=.venv/libtpu $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed-test
	$(BIN)/mypy

clean:
	rm -rf .venv runs/quickstart runs/preferences runs/compare

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -c constraints.txt -e .
	touch $@

# torch is only what the tests compare with: its small CPU build where that can be had, else the ordinary one. libtpu, a TPU's
# compiler, lies beside the other packages: among them jax would look for a TPU whatever it is started for
.venv/.installed-test: .venv/.installed
	$(PIP) --no-deps --retries 0 --index-url https://download.pytorch.org/whl/cpu $(TORCH) || $(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e ".[test]"
	$(PIP) --no-deps --target .venv/libtpu $(LIBTPU) || echo "no $(LIBTPU) here: what compiles for TPUs is skipped"
	touch $@
