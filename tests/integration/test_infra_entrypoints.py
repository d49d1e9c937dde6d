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


def submit(head, words, more=()):
    """more: further options of `ray job submit`."""
    address, environment = head
    here = [word.replace("/opt/vit", str(ROOT)) for word in words]
    runtime = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    options = [f"--address={address}", f"--runtime-env-json={runtime}", *more]
    command = ["ray", "job", "submit", *options, "--", *here]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def test_the_scheduled_evaluation_starts(head):
    command = cron_command()
    assert command[:3] == ["ray", "job", "submit"]
    done = submit(head, [*command[command.index("--") + 1 :], "--help"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "evaluate.py [--flag value ...]" in done.stdout


FILE = "s3://bucket/vit/pipeline.yaml"


def pipeline_file(folder, name):
    """A pipeline for this test, instead of the scheduled one."""
    data = {"job": "prepare", "recipe": "demo", "fields": {"tracking": False}}
    place = folder / "pipeline.yaml"
    place.write_text(yaml.safe_dump({"name": name, "output": str(folder / "out"), "stages": {"data": data}}))
    return place


def jobs(head, name):
    """How many jobs with the name of a stage the cluster has had."""
    address, environment = head
    command = ["ray", "job", "list", f"--address={address}"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    return listed.stdout.count(f"'job_name': '{name}'")


def test_the_scheduled_pipeline_runs(head, tmp_path):
    """The commands of CronJob and RayCronJob: the stage is a job of the cluster, and the second command has nothing to do."""
    cron = cron_command("pipeline.yaml")
    commands = [cron[cron.index("--") + 1 :], shlex.split(entrypoints()["pipeline-raycronjob.yaml"])]
    options = [word for word in cron[3 : cron.index("--")] if not word.startswith("--address=")]
    place = pipeline_file(tmp_path, "nightly")
    head[1]["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    for words in commands:
        assert words.count(FILE) == 1
        done = submit(head, [str(place) if word == FILE else word for word in words], options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "nightly: prepared=" in done.stdout
    assert jobs(head, "nightly/data") == 1
    assert jobs(head, "pipeline") == 2


def table_command(path):
    """The command of the one line of a crontab or scrontab, without its five times."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    (line,) = [line for line in lines if line[0].isdigit()]
    return line.split(" ", 5)[5]


def test_the_tables_of_cron_and_slurm_run(head, tmp_path):
    """Runs them like cron: in a shell with only the environment of the table. The second run has nothing to do."""
    address, environment = head
    place = pipeline_file(tmp_path, "tables")
    (tmp_path / "vit-pipeline").symlink_to(ROOT)
    kept = {name: environment[name] for name in ("PATH", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    kept |= {"HOME": str(tmp_path), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "PYTHONPATH": str(ROOT)}
    for path in (ROOT / "infra/cron/pipeline.cron", ROOT / "infra/slurm/pipeline.scron"):
        command = table_command(path)
        assert FILE in command
        command = command.replace(FILE, str(place)).replace("http://127.0.0.1:8265", address)
        done = subprocess.run(["/bin/bash", "-c", command], env=kept, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "tables: prepared=" in done.stdout
    assert jobs(head, "tables/data") == 1


def test_a_command_in_one_word_does_not_start(head):
    """A quoted entry point fails, because Ray looks for a program with that whole name."""
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
