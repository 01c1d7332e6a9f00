# Every target does its own set-up. Needed beforehand: Python 3.11 to 3.13 and a C++ compiler, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
TYPES := .cache/types
# Two test processes with one thread each by default: `make test WORKERS=8` on a larger machine.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format types docs conformance fuzz offline bench look clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with the pinned dependencies and blade itself (editable)

$(STAMP): constraints.txt pyproject.toml scripts/setup.sh
	@PYTHON="$(PYTHON)" bash scripts/setup.sh $(VENV)
	@touch $@

demo: $(STAMP)  ## compile a Wan transformer with plain Inductor and with blade, and compare (CPU: a few minutes)
	@$(BIN)/python -m benchmarks.demo

test: lint  ## lint, types and all tests but the slow ones (under 15 minutes on 2 cores)
	@$(MAKE) --no-print-directory types & types=$$!; $(PYTEST) -m "not slow"; tests=$$?; \
		wait $$types || { echo "the types are wrong, see above"; exit 1; }; exit $$tests

test-slow: $(STAMP)  ## the tests that take minutes each
	$(PYTEST) -m slow

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## rewrite the files as ruff wants them, and the file tables of the READMEs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python scripts/folder_tables.py

types: $(STAMP)  ## mypy, on the wheel: it does not follow the package's __path__ in a checkout
	$(BIN)/python scripts/install_wheel.py $(TYPES)
	cd $(TYPES) && MYPYPATH=. $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.cache/mypy -p blade_compile

docs: $(STAMP)  ## fill the tables of docs/, draw its picture, and build the pages into build/docs; a warning is an error
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/graph_picture.py
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html -d build/doctrees docs build/docs

conformance: $(STAMP)  ## every diffusers transformer and spelling; resumable; writes the committed table
	$(BIN)/python -m tests.conformance

fuzz: $(STAMP)  ## the property tests with many random examples; resumable; writes the committed table
	$(BIN)/python -m benchmarks.fuzz

offline: $(STAMP)  ## every Triton kernel compiled for every chip, without a GPU; resumable; writes the committed table
	$(BIN)/python -m benchmarks.offline

bench: $(STAMP)  ## measure attention on this machine; writes benchmarks/results
	$(BIN)/python -m benchmarks.cpu_attention

REPORT ?= .cache/report/report.html
look: $(STAMP)  ## photograph a report (REPORT=FILE) in headless Chromium: two widths, light and dark
	@bash scripts/browser.sh $(BIN)
	$(BIN)/python -m benchmarks.look $(REPORT)

clean:  ## remove caches and build output, but not .venv
	rm -rf .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis torch_compile_debug
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
