# make demo   compress a small text-to-image pipeline end to end and write demo_out/report.html
# make test   run the test-suite
# Each does its own set-up on a machine with Python >= 3.10 and a C++ compiler: virtual environment, pinned versions,
# source build (editable, so that Python changes need no reinstall). PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc build_tools -type f -not -name '*.pyc')

.PHONY: demo test setup lint clean
demo: setup
	$(BIN)/pydit demo --out demo_out --budget-minutes 14

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests

setup: $(VENV)/.installed

$(VENV)/.requirements: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("pydit needs Python >= 3.10, got " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV) || { echo "pydit: could not create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) install -q -c constraints.txt torch==2.13.0
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(PIP) install -q -c constraints.txt -e '.[demo,test,report]'
	@touch $@

lint:
	$(PIP) install -q ruff clang-format
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run -Werror $(shell git ls-files 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.h' 'csrc/*.cpp')

clean:
	rm -rf build $(VENV) *.egg-info
