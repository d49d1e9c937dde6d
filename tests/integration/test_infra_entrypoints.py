"""Every entry point that infra/ gives to a cluster, submitted to a real Ray head with token authentication as its tool submits it.

The commands are those of the files; --help is added, so that each job starts, reads its command line and ends.
"""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.rayhead import ray_head

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"


def documents(name):
    return [document for document in yaml.safe_load_all((KUBERAY / name).read_text()) if document]


def cron_command(name="evaluate.yaml"):
    (cron,) = documents(name)
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    return container["command"]


def entrypoints():
    """{file: entry point} of KubeRay's resources, whose operator splits the text as a shell does."""
    jobs = {
        name: documents(name)[0]["spec"]["entrypoint"] for name in ("prepare.yaml", "pretrain.yaml", "transfer.yaml")
    }
    schedules = ("evaluate-raycronjob.yaml", "pipeline-raycronjob.yaml")
    jobs["../rayjob/all/pipeline.yaml"] = documents("../rayjob/all/pipeline.yaml")[0]["spec"]["entrypoint"]
    return jobs | {name: documents(name)[0]["spec"]["jobTemplate"]["entrypoint"] for name in schedules}


@pytest.mark.parametrize("name", ["evaluate", "pipeline"])
def test_the_two_schedules_start_one_command(name):
    command = cron_command(f"{name}.yaml")
    words = [part for word in shlex.split(entrypoints()[f"{name}-raycronjob.yaml"]) for part in word.split("=")]
    assert [part for word in command[command.index("--") + 1 :] for part in word.split("=")] == words


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("home"), "4a1c" * 16) as (address, _, with_token):
        # as in the image, where the project is on the path of every process
        yield address, with_token | {"PYTHONPATH": str(ROOT)}


def submit(head, words):
    address, environment = head
    here = [word.replace("/opt/vit", str(ROOT)) for word in words]
    runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    options = [f"--address={address}", f"--runtime-env-json={runtime}"]
    command = ["ray", "job", "submit", *options, "--", *here]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_the_scheduled_evaluation_starts(head):
    command = cron_command()
    assert command[:3] == ["ray", "job", "submit"]
    done = submit(head, [*command[command.index("--") + 1 :], "--help"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "evaluate.py [--flag value ...]" in done.stdout


def test_the_scheduled_pipeline_runs(head, tmp_path):
    """The CronJob's command on a file of this test's own: its stage is a job of the cluster; a second run has nothing to do."""
    command = cron_command("pipeline.yaml")
    data = {"job": "prepare", "recipe": "demo", "fields": {"tracking": False}}
    place = tmp_path / "pipeline.yaml"
    place.write_text(yaml.safe_dump({"name": "nightly", "output": str(tmp_path / "out"), "stages": {"data": data}}))
    assert command[-2] == "s3://bucket/vit/pipeline.yaml"
    words = [str(place) if word == command[-2] else word for word in command[command.index("--") + 1 :]]
    address, environment = head
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    for _ in range(2):
        done = submit(head, words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nightly: prepared=" in done.stdout
    listed = subprocess.run(
        ["ray", "job", "list", f"--address={address}"], env=environment, capture_output=True, text=True
    )
    assert listed.stdout.count("'job_name': 'nightly/data'") == 1


def test_a_command_in_one_word_does_not(head):
    """What a quoted entry point does: Ray looks for a program of that whole name."""
    command = cron_command()
    done = submit(head, [" ".join(command[command.index("--") + 1 :])])
    assert done.returncode != 0
    assert "not found" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(entrypoints()))
def test_kuberays_entry_points_start(head, name):
    done = submit(head, [*shlex.split(entrypoints()[name]), "--help"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "usage: " in done.stdout
