# demo and test are all a newcomer needs; both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO_DATA := data/demo
# `make demo DEMO_OPTIONS="--set steps=40"`.
DEMO_OPTIONS ?=
# A folder with hashes of all downloads; CI sets it to .ci/hashes.
HASHES ?=
# As -c constraints.txt, for the packages that build source archives too.
CONSTRAINED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
# torchrun --standalone would listen on all interfaces and unpickle what it receives.
SECRET := LGAF_JOB_SECRET=$$(od -An -N16 -tx8 /dev/urandom | tr -d ' ')
# For each reader; `make fuzz FUZZ_SECONDS=600` looks longer.
FUZZ_SECONDS ?= 60

.PHONY: install demo test soak lint fuzz clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(HASHES),$(BIN)/pip install --require-hashes --no-deps -r $(HASHES)/build.txt)
	$(if $(HASHES),$(BIN)/pip install --require-hashes --no-deps --no-build-isolation -r $(HASHES)/packages.txt)
	$(CONSTRAINED) $(BIN)/pip install $(if $(HASHES),--no-build-isolation) -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/lgaf data synth $(DEMO_DATA) --config configs/demo_data.toml
	$(SECRET) $(BIN)/torchrun --nproc-per-node 2 --master-port $$((15000 + $$$$ % 16000)) -m trainer train \
		configs/demo.toml $(DEMO_OPTIONS)

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
	$(CONSTRAINED) $(BIN)/pip install -q -e '.[fuzz]'
	PYTHONPATH=. $(BIN)/python tests/data_pipeline/fuzz.py $(FUZZ_SECONDS)

clean:
	rm -rf .venv data/demo runs/demo
