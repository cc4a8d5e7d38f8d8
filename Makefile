# Each target creates what it needs; a fresh machine needs Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install demo test check notebooks clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("gradlens needs Python 3.11 or later, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[simulations,data,notebook,dev]'
	touch $@

demo: $(STAMP)  ## a sweep of simulated attacks on digits, analysed: reports/demo.html
	$(BIN)/gradlens demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

notebooks: $(STAMP)  ## opens the notebooks
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv runs reports/demo.html
