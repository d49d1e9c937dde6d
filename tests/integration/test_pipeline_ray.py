"""A pipeline on a Ray head with token authentication: each stage is a Ray job with its name, for runners inside and
outside the cluster."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.graph import state
from tests.jobprocess import wait_for
from tests.rayhead import BIN, ray_head

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with ray_head(home, "5b2d" * 16) as (address, without_token, with_token):
        # the head's programs record in a database outside Ray's package folder
        yield address, without_token, with_token | {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db"}


def pipeline_file(folder, name, seeds=(0, 1)):
    stages = {
        "data": {"job": "prepare", "recipe": "demo", "fields": {"tracking": False}, "matrix": {"seed": list(seeds)}},
        "more": {
            "job": "prepare",
            "fields": {"source": "demo:digits", "size": 32, "tracking": False, "sample": 50},
            "after": ["data"],
        },
    }
    place = folder / f"{name}.yaml"
    place.write_text(yaml.safe_dump({"name": name, "output": str(folder / name), "stages": stages}))
    return place


def run(words, environment, folder=ROOT):
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout + done.stderr


def jobs(head):
    """{stage's title: [submission ids]} as `ray job list` shows them."""
    address, _, environment = head
    code, text = run([BIN / "ray", "job", "list", f"--address={address}"], environment)
    assert code == 0, text
    return text


def runner(head, place, *more):
    address, _, environment = head
    words = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), "run", str(place), "--address", address, *more]
    return words, environment | {"PYTHONPATH": str(ROOT)}


def test_from_outside_every_stage_is_a_job_with_its_name(head, tmp_path):
    words, environment = runner(head, pipeline_file(tmp_path, "outside"), "--json")
    code, text = run(words, environment, tmp_path)
    assert code == 0, text
    listed = jobs(head)
    for title in ("outside/data[seed=0]", "outside/data[seed=1]", "outside/more"):
        assert listed.count(f"'job_name': '{title}'") == 1, listed
    (log,) = (tmp_path / "outside" / "_pipeline" / "logs").glob("outside-more-*.log")
    assert "train" in log.read_text() or "prepared=" in log.read_text()
    code, text = run(words, environment, tmp_path)  # done: nothing is submitted again
    assert code == 0, text
    assert jobs(head).count("'job_name': 'outside/") == 3


@pytest.mark.slow
def test_submitted_as_a_job_itself(head, tmp_path):
    address, _, environment = head
    place = pipeline_file(tmp_path, "inside", seeds=(0,))
    package = ROOT / f"inside-{os.getpid()}.yaml"  # what `--working-dir .` ships
    package.write_text(place.read_text())
    try:
        options = [
            f"--address={address}",
            "--working-dir",
            ".",
            "--runtime-env-json",
            json.dumps({"excludes": [".venv", ".git", "docs"]}),
        ]
        command = ["python", "jobs/pipeline.py", "run", package.name]
        code, text = run([BIN / "ray", "job", "submit", *options, "--", *command], environment)
    finally:
        package.unlink()
    assert code == 0, text
    assert "inside: seconds=" in text
    assert "'job_name': 'inside/data[seed=0]'" in jobs(head)


@pytest.mark.slow
def test_a_killed_runner_finds_its_jobs_again(head, tmp_path):
    place = pipeline_file(tmp_path, "killed")
    words, environment = runner(head, place)
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    state = tmp_path / "killed" / "_pipeline" / "state.json"
    for _ in range(600):
        if state.exists() and '"job": "killed-' in state.read_text() and "killed/data" in jobs(head):
            break
        time.sleep(0.2)
    psutil.Process(process.pid).kill()
    process.wait()
    code, text = run(words, environment, tmp_path)
    assert code == 0, text
    assert "still running from an earlier run" in text
    listed = jobs(head)
    for title in ("killed/data[seed=0]", "killed/data[seed=1]", "killed/more"):
        assert listed.count(f"'job_name': '{title}'") == 1, listed


def progress(folder, stage):
    """{attempt: share of its work} of an attempt of the stage that has begun its work."""
    found = {}
    for file in (folder / "_pipeline" / "progress").glob(f"*-{stage}-*.json"):
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            found[file.stem] = json.loads(file.read_text())["share"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_stage_can_be_stopped_and_continues_later(head, tmp_path):
    address, _, environment = head
    data = {"job": "prepare", "recipe": "demo_digits", "fields": {"tracking": False, "num_cpus": 1}}
    places = {"data": "${data.output}/train", "validation": None, "output": str(tmp_path / "trained")}
    training = {**places, "steps": 300, "workers": 1, "checkpoint_every": "1000steps"}
    tasks = {"checkpoint": "${pretrain.output}", "data": "${data.output}", "workers": 1, "tasks": ["knn"]}
    stages = {
        "data": data,
        "pretrain": {"job": "pretrain", "recipe": "demo", "fields": training},
        "transfer": {"job": "transfer", "recipe": "demo", "fields": tasks},
        "other": {**data, "fields": {**data["fields"], "sample": 50}, "after": ["data"]},
    }
    place = tmp_path / "alone.yaml"
    place.write_text(yaml.safe_dump({"name": "alone", "output": str(tmp_path / "out"), "stages": stages}))
    words, with_project = runner(head, place)
    log = tmp_path / "first.log"
    with open(log, "w") as file:
        process = subprocess.Popen(words, cwd=tmp_path, env=with_project, stdout=file, stderr=file)
    wait_for(lambda: max(progress(tmp_path / "out", "pretrain").values(), default=0) > 0.1, 400)
    (training_job,) = progress(tmp_path / "out", "pretrain")
    code, text = run([BIN / "ray", "job", "stop", f"--address={address}", training_job], environment)
    assert code == 0, text
    assert process.wait(timeout=400) == 1, log.read_text()
    code, text = run([*words[:2], "status", str(place), "--json"], with_project, tmp_path)
    states = {name: stage["state"] for name, stage in json.loads(text)["stages"].items()}
    assert states == {"data": "done", "pretrain": "stopped", "transfer": "waiting", "other": "done"}, log.read_text()
    (saved,) = (tmp_path / "trained" / "checkpoints").glob("*/COMMIT.json")
    assert 0 < json.loads(saved.read_text())["step"] < 300
    code, text = run(words, with_project, tmp_path)
    assert code == 0, text
    record = state.load(str(tmp_path / "out")).records["pretrain"]
    assert (record.versions[0].cost["attempts"], record.versions[0].result["steps"]) == (2, 300)
    assert saved.exists()  # the second attempt continued from it


def test_without_the_token_nothing_starts(head, tmp_path):
    _, without_token, _ = head
    place = pipeline_file(tmp_path, "refused")
    words, _ = runner(head, place)
    environment = without_token | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    code, text = run(words, environment, tmp_path)
    assert code == 2, text
    assert "no Ray job server at" in text
    assert "RAY_AUTH_MODE=token" in text
