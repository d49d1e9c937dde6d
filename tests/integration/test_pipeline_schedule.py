"""A pipeline on a schedule: new data lead to new versions of the dependent stages, and runs never overlap."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.graph import state
from tests.images import jpeg

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def add_images(folder, count):
    """Adds `count` images to each of two classes."""
    for seed, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / name / f"{i}.jpg").write_bytes(jpeg(seed=100 * seed + i))


def written(folder):
    """prepare -> pretrain on a source folder of this test."""
    add_images(folder / "source", 8)
    data = {"source": str(folder / "source"), "size": 32, "tracking": False, "num_cpus": 1}
    places = {"data": "${data.output}", "validation": None}
    training = {**places, "steps": 4, "batch_size": 8, "workers": 1, "checkpoint_every": "4steps"}
    stages = {
        "data": {"job": "prepare", "fields": data},
        "pretrain": {"job": "pretrain", "recipe": "demo", "fields": training},
    }
    place = folder / "nightly.yaml"
    place.write_text(yaml.safe_dump({"name": "nightly", "output": str(folder / "out"), "stages": stages}))
    return place


def start(place, log, *more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{place.parent}/mlflow.db"}
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "run", str(place), *more]
    with open(place.parent / log, "w") as file:
        return subprocess.Popen(command, cwd=place.parent, env=environment, stdout=file, stderr=file)


def versions(folder):
    return {name: len(record.versions) for name, record in state.load(str(folder / "out")).records.items()}


def wait_for(condition, seconds=600):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.5)


def test_new_data_make_new_versions_and_two_schedules_run_each_once(tmp_path):
    place = written(tmp_path)
    schedules = [start(place, f"{name}.log", "--every", "3s") for name in ("first", "second")]
    try:
        wait_for(lambda: versions(tmp_path) == {"data": 1, "pretrain": 1})
        time.sleep(7)  # passes without new data
        assert versions(tmp_path) == {"data": 1, "pretrain": 1}
        add_images(tmp_path / "source", 12)
        wait_for(lambda: versions(tmp_path) == {"data": 2, "pretrain": 2})
        assert all(schedule.poll() is None for schedule in schedules)
    finally:
        for schedule in schedules:
            schedule.terminate()
    assert [schedule.wait(timeout=240) for schedule in schedules] == [143, 143]
    logs = (tmp_path / "first.log").read_text() + (tmp_path / "second.log").read_text()
    assert logs.count("data: done") == logs.count("pretrain: done") == 2  # by one of the two schedules
    records = state.load(str(tmp_path / "out")).records
    for record in records.values():
        assert len({version.output for version in record.versions}) == 2  # the old version is kept next to the new one
    rows = [
        json.loads((tmp_path / "out" / v.output / "manifest.json").read_text())["rows"]
        for v in records["data"].versions
    ]
    assert rows == [16, 24]


def test_a_run_that_overlaps_ends_at_once(tmp_path):
    place = written(tmp_path)
    going = start(place, "going.log", "--until", "data")
    wait_for(lambda: (tmp_path / "out" / "_pipeline" / "launch.json").exists())
    skipped, refused = start(place, "skipped.log", "--skip-if-running"), start(place, "refused.log")
    assert skipped.wait(timeout=240) == 0
    assert refused.wait(timeout=240) == 75
    assert "is already running; this run is skipped" in (tmp_path / "skipped.log").read_text()
    assert "is being run by nightly, process" in (tmp_path / "refused.log").read_text()
    assert going.wait(timeout=400) == 0
    assert start(place, "again.log", "--until", "data", "--skip-if-running").wait(timeout=240) == 0
