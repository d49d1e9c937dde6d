# make demo    run the whole pipeline on small real data (DATA=folder or s3://prefix for your own images)
# make test    run what CI runs: lint, types, tests
# make docs    build the documentation in build/site
# make ui      start MLflow on http://127.0.0.1:5000 with the database of the demo and the jobs

# Python 3.11, 3.12 or 3.13
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?=
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Bytecode, by all cores; pip would use one. Some packages contain templates that do not compile.
BYTECODE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib > /dev/null || true

.PHONY: install demo test lint hooks slow docs ui pictures clean

# Every install uses the same constraints, because pip may otherwise replace torch. The file .demo marks a .venv that
# can run the demo; .installed marks one that can also run the tests.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	$(BYTECODE)
	@touch $@

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test]'
	$(BYTECODE)
	@touch $(BIN)/.demo $@

install: $(BIN)/.installed

# Each scheme of DATA has an extra of its own.
demo: $(BIN)/.demo
	$(if $(filter s3://%,$(DATA)),$(PIP) -e '.[s3]')
	$(if $(filter gs://%,$(DATA)),$(PIP) -e '.[gcs]')
	$(BIN)/python jobs/pipeline.py run --recipe demo $(if $(DATA),--data '$(DATA)')

# Two processes; all tests of a file run in the same process.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Installs a git hook that runs the checks of `make lint` on each commit.
hooks: install
	$(BIN)/pre-commit install

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: install
	$(BIN)/python -m pytest -m slow

# Fails on broken links and anchors.
docs: install
	$(BIN)/mkdocs build --strict --quiet

ui: $(BIN)/.demo
	$(BIN)/python -m pipeline.tracking ui --tracking-uri sqlite:///$(CURDIR)/mlflow.db

# Screenshots of the README, from the database of `make demo`. Needs Chromium.
pictures: $(BIN)/.demo
	PYTHONPATH=. $(BIN)/python docs/pictures.py --tracking-uri sqlite:///$(CURDIR)/mlflow.db

clean:
	rm -rf runs mlruns mlflow.db build
