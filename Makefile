# Every target makes .venv if it is missing; nothing is installed outside it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test models bench bench-quick check format clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(BIN)/python -m pytest

# Writes the README's table of models, from the outcome of the tests.
models: .venv/installed
	$(BIN)/python tests/models_table.py

# Everything that the benchmark measures, in one to two hours on two cores; the main rows, in three minutes.
bench: .venv/installed
	$(BIN)/python examples/benchmark/run.py

bench-quick: .venv/installed
	$(BIN)/python examples/benchmark/run.py --quick

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[audio,plot,dev]'
	touch $@
