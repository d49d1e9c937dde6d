"""The views in which MLflow opens the experiments: columns, the best run first, and links that exist where they are shown."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

import mlflow
import pytest

from pipeline.tracking import mlflow_private, names, server, views
from pipeline.tracking.pages import leaderboard_page
from pipeline.tracking.views import SHARE, VIEW
from tests.leaderboard import row
from tests.ports import free_port

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUALITY = {names.PRETRAIN: names.VAL_TOP1, names.TRANSFER: names.MEAN_SCORE, names.EVALUATE: names.MEAN_SCORE}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """A database with three runs in each experiment with a view, the best in the middle, and a child run that is better."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('views')}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    for experiment in views.COLUMNS:
        identifier = server.experiment_id(uri, experiment)
        for name, quality in (("weak", 20.0), ("best", 80.0), ("good", 60.0)):
            run = client.create_run(identifier, run_name=name).info.run_id
            client.log_param(run, "suite", "demo")
            client.log_metric(run, QUALITY.get(experiment, names.ROWS), quality)
            if experiment == names.PRETRAIN:  # MLflow shows only columns that a run has
                client.log_metric(run, names.LOSS, 1.0)
                client.log_metric(run, names.IMAGES_SEEN, 100)
                client.log_metric(run, names.IMAGES_PER_SECOND, 10.0)
                client.log_param(run, "model.variant", "Ti/8")
                client.set_tag(run, names.RECIPE, "demo")
            client.set_terminated(run)
        if experiment == names.TRANSFER:
            child = client.create_run(identifier, run_name="child", tags={names.PARENT: run}).info.run_id
            client.log_metric(child, names.MEAN_SCORE, 99.0)
    return uri


def stored(uri, name):
    """(experiment, its view as MLflow has it)"""
    found = mlflow.MlflowClient(uri).get_experiment_by_name(name)
    return found, json.loads(found.tags[SHARE + VIEW])


@pytest.mark.parametrize("name", views.COLUMNS)
def test_a_view_shows_its_columns_and_the_newest_or_best_run_first(uri, name):
    found, view = stored(uri, name)
    assert view["selectedColumns"][1:-1] == views.COLUMNS[name]
    assert view["columnOrder"] == view["selectedColumns"]
    order = f"{view['orderByKey']} {'ASC' if view['orderByAsc'] else 'DESC'}"
    runs = mlflow.MlflowClient(uri).search_runs([found.experiment_id], view["searchFilter"], order_by=[order])
    shown = [run.info.run_name for run in runs]
    assert shown == (["best", "good", "weak"] if name in QUALITY else ["good", "best", "weak"])
    if name in QUALITY:
        assert f"metrics.`{QUALITY[name]}`" in view["selectedColumns"]


def test_a_view_of_an_earlier_version_is_replaced(uri):
    found, view = stored(uri, names.EVALUATE)
    client = mlflow.MlflowClient(uri)
    client.set_experiment_tag(found.experiment_id, SHARE + VIEW, json.dumps(view | {"selectedColumns": []}))
    server.experiment_id(uri, names.EVALUATE)
    assert stored(uri, names.EVALUATE)[1] == view


@pytest.mark.parametrize("name", views.TITLES)
@pytest.mark.parametrize("on_server", [False, True])
def test_descriptions_link_only_to_what_is_there(name, on_server):
    note = views.experiment_tags(name, "7", on_server)[names.NOTE]
    for link in re.findall(r"\]\(([^)]*)\)", note):
        assert link.startswith("#/experiments/7/runs?viewStateShareKey=") or (link == "/leaderboard" and not on_server)
    # MLflow's list of experiments shows the first forty characters, as they are written
    assert "[" not in note[:40]
    assert not re.search(r"\)\s*\[", note), "two links look like one"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(uri):
    port = free_port()
    command = [sys.executable, "-m", "pipeline.tracking", "ui", "--port", str(port), "--tracking-uri", uri]
    ui = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/", 300)
        page = rendered(f"http://127.0.0.1:{port}/#/experiments/{stored(uri, names.PRETRAIN)[0].experiment_id}")
    finally:
        ui.terminate()
        ui.wait(60)
    places = [page.find(f">{name}<") for name in ("best", "good", "weak")]
    assert -1 not in places
    assert places == sorted(places)
    assert f'data-testid="sort-header-{names.VAL_TOP1}"' in page  # the style of the UI applies to this
    assert mlflow_private.COLUMN_TITLE in page
    for column in ("val/top1", "train/loss", "images_seen", "recipe", "model.variant", "Dataset"):
        assert column in page


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_the_leaderboard_opens_on_the_suite_of_the_newest_result(tmp_path):
    rows = [
        row("a", 60.0, suite="demo", started=1),
        row("b", 50.0, suite="own", started=3),
        row("c", 1.0, suite="vtab1k", started=2),
    ]
    page = tmp_path / "leaderboard.html"
    page.write_text(leaderboard_page(rows))
    shown = rendered(page.as_uri())
    assert "b · 50.00" in shown
    assert "a · 60.00" not in shown


def wait_for(address, seconds):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return urllib.request.urlopen(address, timeout=10).close()
        except OSError:
            assert time.monotonic() < deadline, address
            time.sleep(0.5)


def rendered(address):
    """The page as the browser has it after its scripts have run."""
    with tempfile.TemporaryDirectory(prefix="views-") as profile:
        command = [BROWSER, "--headless=new", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1920,1000"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        command += ["--virtual-time-budget=60000", "--dump-dom", address]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=400).stdout
