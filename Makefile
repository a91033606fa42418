# Every target makes .venv if it is missing; nothing is installed outside it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fuzz quantization models onnx help-pages notebooks docs dist conformance pythons newest oldest peft-main bench bench-quick check format clean

demo: .venv/installed
	$(BIN)/peft-softmoa demo

# A process for each core, with one thread: the models are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile
test: .venv/installed
	$(PYTEST) $(ARGS)

# 2,000 made-up configs and 500 damaged files, by each way of loading, instead of the few that `make test` takes.
fuzz: .venv/installed
	SOFTMOA_FUZZ=2000,500 $(BIN)/python -m pytest -s --timeout 3600 tests/saving/test_checks.py

# Installs bitsandbytes and torchao in .venv, and tests adapters on models that they have quantised.
quantization: .venv/installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[quantization]'
	$(BIN)/python -m pytest tests/test_quantized.py

# Writes the table of models in docs/models.md, from the outcome of the tests.
models: onnx
	$(PYTEST) --models-table tests/test_families.py tests/calls/test_checkpointing.py

# Every model of the table as an ONNX file, instead of the few that `make test` writes.
onnx: .venv/installed
	SOFTMOA_ONNX=all $(PYTEST) tests/inference/test_export_families.py

# Writes the pages that `peft-softmoa --help` shows without loading torch, after a change of the options.
help-pages: .venv/installed
	$(BIN)/python -m pytest -q --help-pages tests/commands/test_help_pages.py

# Runs the notebooks, and writes their outputs into them, after a change of their code.
notebooks: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --notebooks tests/examples/test_notebooks.py

# The site, in site/. A link that leads nowhere, a page that no menu names and a docstring that cannot be read are errors.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Distributions in dist/, checked; the wheel is installed in a new environment, and runs in an empty folder.
dist: .venv/installed
	rm -rf dist .dist && mkdir -p .dist/empty
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv .dist/venv
	.dist/venv/bin/python -m pip install -q -c constraints.txt "$$(ls dist/*.whl)[audio]"
	cd .dist/empty && ../venv/bin/peft-softmoa demo --help && ../venv/bin/python -c 'import peft_softmoa as p; print(p.__version__, p.__file__)'

# PEFT's own tests of custom models, from its source distribution, with Soft-MoA.
conformance: .venv/installed
	$(BIN)/python tests/conformance/run.py

# What depends on the versions of Python and of the libraries.
VERSIONED := tests/test_registration.py tests/test_model.py tests/test_sharing.py tests/method/test_mixture.py \
    tests/commands/test_help_pages.py tests/commands/test_parser.py

# The same on other Pythons: make pythons PYTHONS="python3.10 python3.13"
PYTHONS ?= python3.10 python3.12 python3.13
pythons: $(PYTHONS:%=.pythons/%)

.pythons/%: force
	test -x $@/bin/python || $* -m venv $@
	$@/bin/python -m pip install -q -c constraints.txt '.[audio,dev]'
	$@/bin/python -m pytest -q $(VERSIONED)

# The same with the newest libraries that a plain install gives, but for torch, which is large.
newest:
	test -x .newest/bin/python || $(PYTHON) -m venv .newest
	grep '^torch==' constraints.txt > .newest/constraints.txt
	.newest/bin/python -m pip install -q --upgrade -c .newest/constraints.txt '.[audio,dev]'
	.newest/bin/python -m pip list | grep -E '^(torch|peft|transformers|accelerate|datasets|huggingface.hub) '
	.newest/bin/python -m pytest -q $(VERSIONED)

# The same with the oldest libraries that the package takes, which uv finds.
oldest:
	test -x .oldest/bin/python || $(PYTHON) -m venv .oldest
	.oldest/bin/python -m pip install -q uv
	.oldest/bin/uv pip install -q --python .oldest/bin/python --torch-backend cpu --resolution lowest-direct '.[audio,dev]'
	.oldest/bin/uv pip list --python .oldest/bin/python | grep -E '^(torch|peft|transformers|accelerate|datasets|huggingface.hub) '
	.oldest/bin/python -m pytest -q $(VERSIONED)

# The same with PEFT's main, which the bounds of the package leave out; it may fail.
peft-main:
	test -x .peft-main/bin/python || $(PYTHON) -m venv .peft-main
	.peft-main/bin/python -m pip install -q -c constraints.txt '.[audio,dev]'
	.peft-main/bin/python -m pip install -q --no-deps git+https://github.com/huggingface/peft
	.peft-main/bin/python -m pytest -q $(VERSIONED)

.PHONY: force
force:

# Everything that the benchmark measures, in more than an hour on two cores; the main rows, in three minutes.
bench: .venv/installed
	$(BIN)/python -m examples.benchmark

bench-quick: .venv/installed
	$(BIN)/python -m examples.benchmark --quick

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .pythons .newest .oldest .peft-main .dist dist site .pytest_cache .ruff_cache .mypy_cache .conformance

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[audio,plot,export,docs,dist,dev]'
	touch $@
