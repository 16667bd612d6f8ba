# demo and test are all a newcomer needs; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO_DATA := data/demo
# `make demo DEMO_OPTIONS="--set steps=40"`.
DEMO_OPTIONS ?=
# For each reader; `make fuzz FUZZ_SECONDS=600` looks longer.
FUZZ_SECONDS ?= 60

.PHONY: install demo test soak lint fuzz clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/lgaf data synth $(DEMO_DATA) --config configs/demo_data.toml
	$(BIN)/torchrun --standalone --nproc-per-node 2 -m trainer train configs/demo.toml $(DEMO_OPTIONS)

test: install
	$(BIN)/pytest

# Kills ranks of a running training 50 times, for about a quarter of an hour.
soak: install
	$(BIN)/python -m tests.trainer.soak --kills 50

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: install
	$(BIN)/pip install -q -c constraints.txt -e '.[fuzz]'
	PYTHONPATH=. $(BIN)/python tests/data_pipeline/fuzz.py $(FUZZ_SECONDS)

clean:
	rm -rf .venv data/demo runs/demo
