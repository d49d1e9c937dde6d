"""A pipeline of real jobs: after a change of a stage, only the stage and its descendants run again; a moved folder
changes nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.graph import state

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def run(folder, output, **training):
    """(stages that were started, the log) of a run that must succeed."""
    data = {"tracking": False, "num_cpus": 1, "sample": 200}
    fields = {"data": "${data.output}/train", "validation": None, "steps": 6, "workers": 1, **training}
    tasks = {"checkpoint": "${pretrain.output}", "data": "${data.output}", "workers": 1, "tasks": ["knn"]}
    stages = {
        "data": {"job": "prepare", "recipe": "demo_digits", "fields": data},
        "other": {"job": "prepare", "recipe": "demo_digits", "fields": {**data, "seed": 1}},
        "pretrain": {"job": "pretrain", "recipe": "demo", "fields": fields},
        "transfer": {"job": "transfer", "recipe": "demo", "fields": tasks},
    }
    place = folder / "crop.yaml"
    place.write_text(yaml.safe_dump({"name": "crop", "output": str(output), "stages": stages}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "run", str(place)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"(\S+): started", done.stderr), done.stdout


def test_a_changed_crop_repeats_the_transfer_and_a_moved_folder_repeats_nothing(tmp_path):
    started, _ = run(tmp_path, tmp_path / "out")
    assert sorted(started) == ["data", "other", "pretrain", "transfer"]
    started, _ = run(tmp_path, tmp_path / "out", **{"augment.area": [0.21, 1.0]})
    assert started == ["pretrain", "transfer"]
    shutil.move(tmp_path / "out", tmp_path / "elsewhere" / "moved")
    started, text = run(tmp_path, tmp_path / "elsewhere" / "moved", **{"augment.area": [0.21, 1.0]})
    assert started == []
    assert "4 done" in text
    started, _ = run(
        tmp_path, tmp_path / "elsewhere" / "moved", checkpoint_every="2steps"
    )  # the first crop: still there
    assert started == []
    records = state.load(str(tmp_path / "elsewhere" / "moved")).records
    assert {name: len(record.versions) for name, record in records.items()} == {
        "data": 1,
        "other": 1,
        "pretrain": 2,
        "transfer": 2,
    }
