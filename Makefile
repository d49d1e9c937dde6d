# make demo    the whole pipeline on small real data     (DATA=folder or s3://prefix for your own images)
# make test    what CI runs: lint, types, tests
# make ui      MLflow on http://127.0.0.1:5000, on the database that the demo and the jobs write

# Python 3.11, 3.12 or 3.13
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?=

.PHONY: install demo test lint hooks slow ui clean

# One constraints file for every install: another resolution would bring another torch.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

install: $(BIN)/.installed

demo: install
	$(BIN)/python jobs/demo.py $(if $(DATA),--data '$(DATA)')

# A process per core, a file of tests stays in one of them.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Once: checks each commit as `make lint` does.
hooks: install
	$(BIN)/pre-commit install

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: install
	$(BIN)/python -m pytest -m slow

ui: install
	$(BIN)/mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(CURDIR)/mlflow.db

clean:
	rm -rf runs mlruns mlflow.db
