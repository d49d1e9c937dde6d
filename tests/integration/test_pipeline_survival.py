"""Pipelines as processes of this machine, killed while they run: the runner, its stages, or both."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline import lease
from pipeline.graph import state
from pipeline.tracking import names, search
from tests.jobprocess import running_jobs, wait_for

ROOT = Path(__file__).parents[2]
DATA = {"job": "prepare", "recipe": "demo_digits", "fields": {"tracking": False, "num_cpus": 1}}


def sweep():
    """Two pre-trainings and 2 x 3 transfers."""
    places = {"data": "${data.output}/train", "validation": "${data.output}/test"}
    training = {**places, "steps": 60, "workers": 1, "checkpoint_every": "10steps", "augment.area": [0.9, 1.0]}
    tasks = {"checkpoint": "${pretrain.output}", "data": "${data.output}", "workers": 1, "steps": 10}
    return {
        "data": DATA,
        "pretrain": {"job": "pretrain", "recipe": "demo", "fields": training, "matrix": {"optimizer.lr": [1e-3, 3e-4]}},
        "transfer": {
            "job": "transfer",
            "recipe": "demo",
            "fields": tasks,
            "matrix": {"tasks": ["finetune", "linear", "knn"]},
        },
    }


def start(folder, name, stages):
    place = folder / f"{name}.yaml"
    place.write_text(yaml.safe_dump({"name": name, "output": str(folder / name), "stages": stages}))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/{name}.db"}
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "run", str(place)]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def results(folder, name):
    """{finished stage: result}"""
    records = state.load(str(folder / name)).records
    return {stage: record.versions[-1].result for stage, record in records.items() if record.versions}


def mlflow_runs(folder, name):
    """The states of the pipeline's own runs in MLflow."""
    return [run.status for run in search.search_runs(names.PIPELINE, uri=f"sqlite:///{folder}/{name}.db")]


def test_a_killed_runner_finds_its_process_again(tmp_path):
    process = start(tmp_path, "one", {"data": DATA})
    wait_for(lambda: running_jobs(tmp_path / "one"), 240)
    process.kill()
    process.wait()
    (stage,) = running_jobs(tmp_path / "one")  # it outlives its runner
    assert start(tmp_path, "one", {"data": DATA}).wait(timeout=240) == 0
    assert not stage.is_running()
    log = (tmp_path / "one.log").read_text()
    assert "data: still running from an earlier run" in log
    assert log.count("data: started") == 1
    assert state.load(str(tmp_path / "one")).records["data"].versions[-1].cost["attempts"] == 1
    assert mlflow_runs(tmp_path, "one") == ["FINISHED"]


def test_a_killed_stage_is_retried_and_a_second_runner_is_refused(tmp_path):
    process = start(tmp_path, "two", {"data": DATA})
    wait_for(lambda: running_jobs(tmp_path / "two"), 240)
    second = start(tmp_path, "two", {"data": DATA})
    assert second.wait(timeout=120) == 75
    assert "is being run by two, process" in (tmp_path / "two.log").read_text()
    running_jobs(tmp_path / "two")[0].kill()
    assert process.wait(timeout=240) == 0
    assert state.load(str(tmp_path / "two")).records["data"].versions[-1].cost["attempts"] == 2


def test_a_stopped_runner_stops_its_stages(tmp_path):
    process = start(tmp_path, "three", {"data": DATA})
    wait_for(lambda: running_jobs(tmp_path / "three"), 240)
    time.sleep(2)  # wait until the job has installed its signal handler
    process.terminate()
    assert process.wait(timeout=240) == 143
    assert not running_jobs(tmp_path / "three")
    plain = json.loads((tmp_path / "three" / "_pipeline" / "state.json").read_text())
    assert plain["stages"]["data"]["running"] is None


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_of_two_running_stages_can_be_stopped(tmp_path):
    other, more = ({**DATA, "fields": {**DATA["fields"], "seed": seed}} for seed in (1, 2))
    stages = {"data": DATA, "other": other, "more": {**more, "after": ["other"]}}
    process = start(tmp_path, "four", stages)
    wait_for(lambda: len(running_jobs(tmp_path / "four")) == 2, 240)
    command = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "stop", str(tmp_path / "four.yaml"), "other"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.count("asked to stop")) == (0, 1), done.stdout + done.stderr
    assert process.wait(timeout=900) == 1
    assert list(results(tmp_path, "four")) == ["data"]
    assert state.load(str(tmp_path / "four")).records["other"].failed.stopped
    assert start(tmp_path, "four", stages).wait(timeout=900) == 0
    assert list(results(tmp_path, "four")) == ["data", "other", "more"]
    assert (tmp_path / "four.log").read_text().count("data: started") == 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_runner_waits_for_an_output_that_is_in_use(tmp_path):
    """After the loss of a head, its stage on another node still uses the output that the next attempt needs."""
    training = {"data": "${data.output}/train", "validation": None, "steps": 4, "workers": 1}
    training["output"] = str(tmp_path / "trained")
    stages = {"data": DATA, "pretrain": {"job": "pretrain", "recipe": "demo", "fields": training}}
    with lease.Lease(training["output"], "left over"):
        process = start(tmp_path, "busy", stages)
        log = tmp_path / "busy.log"
        wait_for(lambda: "is being trained in by left over" in log.read_text(), 900)
    assert process.wait(timeout=900) == 0
    assert "pretrain: started (attempt 2)" in log.read_text()
    assert results(tmp_path, "busy")["pretrain"]["steps"] == 4


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_killed_at_five_random_moments_the_scores_are_the_same(tmp_path):
    assert start(tmp_path, "calm", sweep()).wait(timeout=2400) == 0
    dice = random.Random(7)
    process = start(tmp_path, "wild", sweep())
    for victim in ("runner", "stage", "both", "stage", "runner"):
        time.sleep(dice.uniform(5, 30))
        here = running_jobs(tmp_path / "wild")
        for stage in here if victim == "both" else here[:1] if victim == "stage" else []:
            stage.kill()
        if victim != "stage":
            process.kill()
            process.wait()
            process = start(tmp_path, "wild", sweep())
    assert process.wait(timeout=2400) == 0
    assert results(tmp_path, "wild") == results(tmp_path, "calm")
    assert len(results(tmp_path, "wild")) == 9
    assert mlflow_runs(tmp_path, "wild") == ["FINISHED"]
    assert "out of date" not in (tmp_path / "wild.log").read_text()  # stages are taken over, not stopped
