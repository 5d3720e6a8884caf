# make demo    from nothing to runs/demo/report.html
# make test    from nothing to all tests
# make check   lint, format, types, import contract, tests
PYTHON ?= python3
VENV := .venv
TEST_PROCESSES ?= 2
BIN := $(CURDIR)/$(VENV)/bin
INSTALLED := $(VENV)/.installed

export PATH := $(BIN):$(PATH)
# DeepSpeed compiles a small C++ operator at first use; once per environment, not once per training run.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lint types imports install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else f"Python 3.11 or 3.12 is needed, found {v[0]}.{v[1]}: make PYTHON=python3.11")'
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed (Debian: apt-get install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m train.compile_operators
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python cluster/pipeline.py --config cluster/configs/demo.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

check: lint types imports test

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs
