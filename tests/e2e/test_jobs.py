"""The jobs as a user runs them: own processes, embedded Ray, exit codes; the whole way from printed letters to handwritten
digits."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from models import create_model
from pipeline.weights import checkpoints, load_weights
from tests.jobprocess import job

pytestmark = pytest.mark.timeout(2400)  # the demo runs five jobs in sequence


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The demo: prepared letters and digits, a pre-training run of two workers, transfer scores. A copy of the folder
    VIT_DEMO, where `make demo` has just run, with its output in demo.log; or else made here, with fewer steps."""
    root = tmp_path_factory.mktemp("demo")
    if made := os.environ.get("VIT_DEMO"):
        for name in ("mlflow.db", "demo.log"):
            shutil.copy(Path(made, name), root)
        shutil.copytree(Path(made, "runs", "demo"), root / "runs" / "demo")
        return root
    done = job("pipeline", "run", "--recipe", "demo", "--steps", "160", cwd=root, timeout=2000)
    (root / "demo.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def steps(digits) -> int:
    """The number of steps of the demo's pre-training."""
    return checkpoints.latest(str(digits / "runs/demo/pretrain")).step


def test_demo_learns_letters_transfers_to_digits_and_prints_its_lines(digits):
    log = (digits / "demo.log").read_text()
    prepared = re.search(r"^demo: prepared=(\d+) shards=(\d+) rejects=(\d+)$", log, re.M)
    assert prepared.groups()[0] == "861"
    assert prepared.groups()[2] == "0"
    trained = re.search(r"^demo: loss_first=([\d.]+) loss_last=([\d.]+) top1=([\d.]+)$", log, re.M)
    assert float(trained[2]) < 0.7 * float(trained[1])
    assert float(trained[3]) > 20  # percent of 41 letters: chance is 2.4
    scores = dict(part.split("=") for line in re.findall(r"^demo: transfer (.*)$", log, re.M) for part in line.split())
    assert len(scores) >= 4
    assert float(scores["linear"]) > 70
    assert re.search(r"^demo: random .*linear=[\d.]+", log, re.M)
    assert re.search(r"^demo: seconds=[\d.]+$", log, re.M)


def test_checkpoint_is_complete_and_stands_alone(digits):
    newest = checkpoints.latest(str(digits / "runs/demo/pretrain"))
    assert newest.commit["workers"] == 2
    config = json.loads(Path(newest.uri, "config.json").read_text())
    load_weights(create_model(**config["model"]), newest.uri)


def test_runs_are_in_mlflow_as_a_tree(digits, steps):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{digits}/mlflow.db")
    experiments = {e.name: e.experiment_id for e in client.search_experiments()}
    assert {"pretrain", "transfer"} <= set(experiments)
    (pretrain,) = client.search_runs([experiments["pretrain"]])
    assert pretrain.info.status == "FINISHED"
    assert pretrain.data.params["optimizer.lr"]
    history = client.get_metric_history(pretrain.info.run_id, "train/loss")
    logged = [point.step for point in history]
    assert logged == sorted(set(logged))
    assert logged[-1] == steps
    pictures = {file.path for file in client.list_artifacts(pretrain.info.run_id, "samples")}
    assert pictures == {"samples/first-batch.png", "samples/attention.png"}
    transfer = client.search_runs([experiments["transfer"]])
    parents = [run for run in transfer if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 2  # the pre-trained encoder, and one with random weights
    assert len(transfer) > 6


def test_the_run_of_the_pipeline_links_its_stages_and_has_costs_picture_and_page(digits, steps):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{digits}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("pipeline").experiment_id])
    assert run.info.status == "FINISHED"
    assert {"graph.png", "report.md", "report.html"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    tags = run.data.tags
    stages = {key.removeprefix("stage."): value for key, value in tags.items() if key.startswith("stage.")}
    assert set(stages) == {"data", "digits", "pretrain", "transfer"}
    for name, stage in stages.items():
        assert client.get_run(stage).data.tags["lineage.pipeline"] == run.info.run_id
        assert f"/runs/{stage}" in tags["mlflow.note.content"]
        assert {f"stage/{name}/seconds", f"stage/{name}/estimated_seconds"} <= set(run.data.metrics)
    assert "#/models/demo/versions/1" in tags["mlflow.note.content"]
    assert re.match(
        rf"demo: 5 of 5 stages done\. pretrain: {steps} steps, top-1 [\d.]+%; transfer: mean",
        tags["mlflow.note.content"],
    )
    assert {"cost/cpu_hours", "cost/gpu_hours", "cost/read", "cost/written"} <= set(run.data.metrics)
    (version,) = client.search_model_versions("name = 'demo'")
    assert set(client.get_registered_model("demo").aliases) == {"champion"}
    assert version.run_id == stages["pretrain"]


def test_repeated_command_continues_and_changed_command_is_refused(digits):
    (record,) = digits.rglob("pretrain/run.json")
    mine = record.read_text()
    command = ("pretrain", "--steps", json.loads(mine)["config"]["steps"])
    same = job(*command, cwd=digits)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "already finished" in same.stderr
    other = job(*command, "--optimizer.lr", "0.5", cwd=digits)
    assert other.returncode == 2
    assert "contains another run (optimizer.lr" in other.stderr
    assert job(*command, "--resume", "never", cwd=digits).returncode == 2
    record.write_text(mine.replace('"format": ', '"format": 9'))
    newer = job(*command, cwd=digits)
    record.write_text(mine)
    assert newer.returncode == 2
    assert f"run.json: its format is 9{json.loads(mine)['format']}, this program reads" in newer.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pretrain", ["--recipe", "dmeo"], 'did you mean "demo"'),
        ("pretrain", ["--batch-sise", "3"], "--batch-size"),
        ("pretrain", ["--data", "nowhere"], "no dataset here"),
        ("pretrain", ["--batch-size", "63"], "2 workers cannot share batches of 63 in 21 lanes"),
        ("pretrain", ["--model.variant", "Ti/15"], "15"),
        ("pretrain", ["--resume", "must", "--output", "empty"], "contains no checkpoint to continue"),
        ("prepare", ["--source", "nowhere", "--output", "out"], "nowhere"),
        ("prepare", ["--source", "runs", "--output", "s3://no-such-bucket-here/x"], "s3://"),
        ("transfer", ["--checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(digits, name, arguments, message):
    before = sorted(path for path in digits.iterdir())
    environment = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
    }
    done = job(name, *arguments, cwd=digits, timeout=600, **environment)
    unreachable = message == "s3://"  # an unavailable store is not wrong input
    assert done.returncode == (75 if unreachable else 2), done.stdout + done.stderr
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert sorted(path for path in digits.iterdir()) == before
