# make demo    the whole pipeline on small real data     (DATA=folder or s3://prefix for your own images)
# make test    what CI runs: lint, types, tests
# make docs    the documentation site in build/site
# make ui      MLflow on http://127.0.0.1:5000, on the database that the demo and the jobs write

# Python 3.11, 3.12 or 3.13
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?=
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test lint hooks slow docs ui pictures clean

# Every install uses the same constraints: without them pip may replace torch. The file .demo says that .venv can run the demo,
# the file .installed that it can also run the tests.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(BIN)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $(BIN)/.demo $@

install: $(BIN)/.installed

# s3:// needs the libraries of the extra `cloud`.
demo: $(BIN)/.demo
	$(if $(filter s3://%,$(DATA)),$(PIP) -e '.[cloud]')
	$(BIN)/python jobs/pipeline.py run --recipe demo $(if $(DATA),--data '$(DATA)')

# Two processes; each takes whole test files.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Run once: from then on each commit is checked as `make lint` does.
hooks: install
	$(BIN)/pre-commit install

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: install
	$(BIN)/python -m pytest -m slow

# Fails on a link or an anchor that leads nowhere.
docs: install
	$(BIN)/mkdocs build --strict --quiet

ui: $(BIN)/.demo
	$(BIN)/python -m pipeline.tracking ui --tracking-uri sqlite:///$(CURDIR)/mlflow.db

# The pictures of README, from the database of `make demo`; takes an installed Chromium.
pictures: $(BIN)/.demo
	PYTHONPATH=. $(BIN)/python docs/pictures.py --tracking-uri sqlite:///$(CURDIR)/mlflow.db

clean:
	rm -rf runs mlruns mlflow.db build
