"""Whole suites on embedded Ray: fan-out, resume, failures, dead workers, MLflow, the command line."""

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch

from models import create_model
from pipeline import storage, workqueue
from pipeline.data import open_dataset
from pipeline.errors import InUse, UserError
from pipeline.lease import Lease
from pipeline.tracking import registry, search, server, start_run
from pipeline.transfer import TransferConfig, report, run_suite, suites
from pipeline.transfer.checkpoint import load_checkpoint
from pipeline.transfer.jobs import Result
from pipeline.transfer.predictions import unpack_predictions
from pipeline.transfer.protocols import FineTune, Split, TransferTask
from pipeline.transfer.record import attach_scores
from pipeline.transfer.scheduler import FailedJob, Finished, Pool, Scheduler
from pipeline.transfer.scores import Score
from pipeline.vtab import TASKS, miniature, prepare
from pipeline.weights import save_checkpoint_weights
from tests.datasets import write_tinted_patches
from tests.runs import commit_checkpoint

SIZE = 16
JOB = str(Path(__file__).parents[2] / "jobs" / "transfer.py")


def colours(uri, n, seed):
    write_tinted_patches(uri, n, SIZE, seed=seed, noise=140, tint=30)


def checkpoint(folder, seed=0):
    """A committed checkpoint of a tiny, freshly initialised model."""
    torch.manual_seed(seed)
    target = folder / "checkpoints" / "step-00000001"
    save_checkpoint_weights(create_model("mu/4", 3, SIZE, depth=1), {"classes": ["r", "g", "b"]}, str(target))
    commit_checkpoint(target, 1)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, data of three tasks in the layout of VTAB, and MLflow's database."""
    root = tmp_path_factory.mktemp("transfer")
    for task in ("pets", "svhn", "dmlab"):
        for seed, (split, n) in enumerate((("train800val200", 90), ("train800", 60), ("val200", 30), ("test", 60))):
            colours(str(root / "data" / task / split), n, seed)
    checkpoint(root / "run")
    return root


def config(world, output, **more):
    settings = {
        "suite": "vtab1k",
        "checkpoint": str(world / "run"),
        "data": str(world / "data"),
        "output": str(output),
        "tasks": ("pets", "svhn", "dmlab"),
        "steps": 8,
        "batch_size": 30,
        "resolution": SIZE,
        "lrs": (0.05,),
        "workers": 1,
        "tracking_uri": f"sqlite:///{world}/mlflow.db",
    }
    return TransferConfig(**{**settings, **more})


def results(output):
    return {str(p.relative_to(output / "results")): p.stat().st_mtime_ns for p in (output / "results").rglob("*.json")}


TWO_RATES = {"lrs": (0.001, 0.1), "seeds": 2}


@pytest.fixture(scope="module")
def finished(ray_local, world, tmp_path_factory):
    """(folder, result) of a suite of three tasks, two rates and two seeds."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, run_suite(config(world, output, **TWO_RATES))


@pytest.mark.timeout(600)
def test_a_suite_has_scores_a_report_and_a_run_with_a_child_for_each_task(finished, world):
    import mlflow

    output, result = finished
    assert list(result.scores) == ["pets", "svhn", "dmlab"]  # the suite's order
    assert all(score > 50 for score in result.scores.values())
    assert result.flat_mean is None  # three of nineteen
    assert result.mean == pytest.approx(np.mean(list(result.scores.values())))
    assert not result.failures
    assert len(results(output)) == 3 * (2 + 2)
    for name in ("report.md", "scores.json", "scores.png", "curves.png", "confusion.png"):
        assert (output / name).stat().st_size > 100, name
    client = mlflow.MlflowClient(config(world, output).tracking_uri)
    parent = client.get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["score/pets"] == pytest.approx(result.scores["pets"])
    assert parent.data.metrics["score_mean/partial"] == pytest.approx(result.mean)
    assert "score_mean" not in parent.data.metrics  # that is VTAB's
    assert {"report.md", "scores.json", "scores.png"} <= {file.path for file in client.list_artifacts(result.run_id)}
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{result.run_id}'")
    assert {child.info.run_name.partition(" · ")[0] for child in children} == {"pets", "svhn", "dmlab"}
    assert all(child.info.run_name.partition(" · ")[2] for child in children)  # the checkpoint
    assert all(any("train/loss" in key for key in child.data.metrics) for child in children)


@pytest.mark.timeout(600)
def test_only_the_missing_results_of_a_suite_are_computed_again_and_they_are_the_same(finished, world):
    import mlflow

    output, first = finished
    names = results(output)
    (gone,) = (output / "results" / "svhn").glob("final-*-seed1.json")
    before = json.loads(gone.read_text())
    gone.unlink()
    state = json.loads((output / "run.json").read_text())
    del (
        state["children"]["pets"],
        state["recorded"]["pets"],
    )  # the state left by a driver that dies after the last result
    (output / "run.json").write_text(json.dumps(state))
    again = run_suite(config(world, output, **TWO_RATES))
    after = results(output)
    assert {name for name in after if after[name] != names[name]} == {f"svhn/{gone.name}"}
    assert json.loads(gone.read_text())["accuracy"] == before["accuracy"]
    assert json.loads(gone.read_text())["curve"] == before["curve"]
    assert again.scores == first.scores
    assert again.run_id == first.run_id
    state = json.loads((output / "run.json").read_text())
    assert state["recorded"] == {"pets": 4, "svhn": 4, "dmlab": 4}
    client = mlflow.MlflowClient(config(world, output).tracking_uri)
    assert client.get_run(state["children"]["pets"]).info.status == "FINISHED"


def test_suites_are_compared_by_their_folders_or_by_their_ids_in_mlflow(finished, world):
    output, result = finished
    uri = config(world, output).tracking_uri
    by_folder, by_id = (report.compare_runs(one, str(output), uri) for one in (str(output), result.run_id))
    assert by_id[1] == by_folder[1]
    assert [row["difference"] for row in by_id[1]] == [0, 0, 0]
    with pytest.raises(UserError, match="0123456789abcdef"):
        report.compare_runs(str(output), 2 * "0123456789abcdef", uri)


def test_another_checkpoint_protocol_or_folder_does_not_mix_with_a_suite(finished, world, tmp_path):
    output, _ = finished
    before = results(output)
    with pytest.raises(UserError, match="another protocol"):
        run_suite(config(world, output, lrs=(0.001, 0.1), steps=9))
    with pytest.raises(UserError, match="another checkpoint"):
        run_suite(config(world, output, lrs=(0.001, 0.1), checkpoint=checkpoint(tmp_path / "other", seed=1)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="contains other files than transfer results"):
        run_suite(config(world, tmp_path / "full"))
    assert results(output) == before


@pytest.mark.timeout(600)
def test_a_second_command_into_one_output_is_refused_by_the_name_of_the_first(world, tmp_path):
    with Lease(str(tmp_path / "out"), "vtab1k-first"):
        with pytest.raises(InUse, match=r"out is being written by vtab1k-first, process \d+"):
            run_suite(config(world, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_one_failing_task_does_not_stop_the_others(ray_local, world, tmp_path):
    broken = tmp_path / "data"
    for task in ("pets", "svhn"):
        for split in ("train800val200", "test"):
            colours(str(broken / task / split), 30, 0)
    shard = next((broken / "svhn" / "train800val200").glob("part-*.parquet"))
    original = shard.read_bytes()
    settings = config(world, tmp_path / "out", data=str(broken), tasks=("pets", "svhn"))
    shard.write_bytes(original[:200])
    with pytest.raises(UserError, match=r"svhn: .*has 200 bytes instead of"):  # a short shard is found before any work
        run_suite(settings)
    shard.write_bytes(original[:200] + bytes(len(original) - 200))
    result = run_suite(settings)
    assert list(result.scores) == ["pets"]
    assert list(result.failures) == ["svhn/final-lr0.05-seed0"]
    assert "row group 0 is damaged" in result.failures["svhn/final-lr0.05-seed0"]
    assert (tmp_path / "out" / "failures" / "svhn" / "final-lr0.05-seed0.json").exists()
    assert "row group 0 is damaged" in (tmp_path / "out" / "report.md").read_text()

    colours(str(broken / "svhn" / "train800val200"), 30, 0)  # repaired: the same data again
    repaired = run_suite(settings)
    assert list(repaired.scores) == ["pets", "svhn"]
    assert not repaired.failures
    assert not list((tmp_path / "out" / "failures").rglob("*.json"))


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_frozen_suite_computes_features_once(ray_local, world, tmp_path):
    for split, n in (("train", 90), ("test", 60)):
        colours(str(tmp_path / "sets" / "own" / split), n, n)
    settings = config(
        world, tmp_path / "out", suite="frozen", data=str(tmp_path / "sets"), tasks=(), resolution=None, seeds=2, l2=0.0
    )
    result = run_suite(settings)
    assert list(result.scores) == [*(f"own-fewshot-{n}" for n in (1, 5, 10, 25)), "own-linear", "own-knn"]
    assert result.scores["own-linear"] > 60
    assert result.scores["own-fewshot-25"] > result.scores["own-fewshot-1"]
    assert result.flat_mean == pytest.approx(np.mean(list(result.scores.values())))
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").rglob("*.parquet")}
    for path in (tmp_path / "out" / "results").rglob("*.json"):
        path.unlink()
    assert run_suite(settings).scores == result.scores
    assert parts == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "features").rglob("*.parquet")}


def test_scores_reach_the_registered_versions_of_the_checkpoint(world, monkeypatch):
    monkeypatch.setattr(
        registry, "save_classifier", lambda _, folder: storage.write_bytes(f"{folder}/MLmodel", b"x: 1\n")
    )
    settings = config(world, "unused")
    uri = settings.tracking_uri
    weights = load_checkpoint(settings)
    version = registry.register(weights.uri, name="attached", uri=uri)
    with start_run("transfer", "scores", tracking_uri=uri) as parent:
        parent.log({"score_mean": 60.0, "score/pets": 70.0, "score/svhn": 50.0})
        scores = [
            Score(name=name, task=name, group="natural", values=(value,), images=100, test=name)
            for name, value in (("pets", 70.0), ("svhn", 50.0))
        ]
        for _ in range(2):  # a repetition changes nothing
            attach_scores(settings, weights.uri, {"mean": 60.0}, scores, parent)
    (found,) = registry.versions_of(weights.uri, uri)
    assert found.version == version.version
    ((key, evaluation),) = found.evaluations.items()
    assert key == f"vtab1k:{suites.suite_version(settings)}"
    assert (evaluation["mean"], evaluation["run"]) == (60.0, parent.id)
    assert evaluation["spread"] == pytest.approx(((0.7 * 0.3 + 0.5 * 0.5) / 100) ** 0.5 / 2 * 100)
    client = server.client(uri)
    metrics = {metric.key: metric.value for metric in client.get_logged_model(version.model_id).metrics}
    assert metrics == {"score_mean": 60.0, "score/pets": 70.0, "score/svhn": 50.0}
    assert len(client.get_metric_history(parent.id, "score/pets")) == 1


def fragile():
    """A fake worker whose process dies at the first job, unless a marker file exists."""

    class Fragile:  # inside a function, so that Ray ships the class and not the name of this module
        def __init__(self, mark):
            self.mark = mark

        def progress(self):
            return (0, 0, 0.0)

        def run(self, job, features):
            name = job.task.name
            if name == "hopeless" or (name == "shaky" and not os.path.exists(self.mark)):
                Path(self.mark).touch()
                os._exit(1)
            found = Result(task=name, phase="final", lr=0.1, seed=0, accuracy={"": 100.0}, images=1, seconds=0)
            return found, None

    return Fragile


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_dead_processes_are_replaced_a_limited_number_of_times(ray_local, tmp_path):
    tasks = [
        TransferTask(name=name, train=Split(uri="/x"), test=Split(uri="/y"), protocol=FineTune(lrs=(0.1,)))
        for name in ("shaky", "steady", "hopeless")
    ]
    actor = ray_local.remote(fragile()).options(max_concurrency=2, num_cpus=0.1)
    results = {}
    pool = Pool(actor, (str(tmp_path / "mark"),), limit=1)
    scheduler = Scheduler(tasks, 1, results, pool, costs={"shaky": 3, "steady": 2, "hopeless": 1}, retries=1)
    events = list(scheduler.run())
    assert sorted(event.job.task.name for event in events if isinstance(event, Finished)) == ["shaky", "steady"]
    (failed,) = (event for event in events if isinstance(event, FailedJob))
    assert failed.job.name == "hopeless/final-lr0.1-seed0"
    assert "died 2 times" in failed.error
    assert set(results) == {"shaky/final-lr0.1-seed0", "steady/final-lr0.1-seed0"}


SHARED_GPU = """
import dataclasses, json, sys
import ray
from models import create_model
from pipeline import cluster
from pipeline.transfer import TransferConfig
from pipeline.transfer.run import plan_workers
from pipeline.transfer.scheduler import FailedJob, Pool, Scheduler, Tick
from pipeline.transfer.protocols import FineTune, Split, TransferTask
from pipeline.transfer.worker import TransferWorker

data, size = sys.argv[1], int(sys.argv[2])
ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, runtime_env=cluster.runtime_env(False))
resources, count = plan_workers(TransferConfig(suite="vtab1k", checkpoint="x", data=data, gpus_per_worker=0.5))

class Worker(TransferWorker):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        assert self.execution.device == "cuda" and ray.get_gpu_ids() == [0]
        self.execution = dataclasses.replace(self.execution, device="cpu")  # the GPU of this test is a number of Ray's

model = create_model("mu/4", 3, size, depth=1)
weights = [ray.put({name: tensor.numpy() for name, tensor in model.state_dict().items()})]
protocol = FineTune(resolution=size, steps=60, batch_size=30, lrs=(0.05,))
split = lambda name: Split(uri=f"{data}/pets/{name}")
tasks = [TransferTask(name=f"task{i}", train=split("train800val200"), test=split("test"), protocol=protocol) for i in range(4)]
actor, results = ray.remote(Worker).options(max_concurrency=2, **resources), {}
together, failures = 0, {}
pool = Pool(actor, (model.config, weights, 1, 30), limit=count)
for event in Scheduler(tasks, 1, results, pool, costs={task.name: 1.0 for task in tasks}).run():
    if isinstance(event, FailedJob):
        failures[event.job.name] = event.error
    if isinstance(event, Tick) and len(event.running) == 2 and ray.available_resources().get("GPU", 0) == 0:
        together += 1
print(json.dumps({**resources, "workers": count, "failures": failures, "results": len(results), "together": together}))
"""


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_two_workers_share_a_gpu(world):
    command = [sys.executable, "-c", SHARED_GPU, str(world / "data"), str(SIZE)]
    done = subprocess.run(command, cwd=Path(JOB).parents[1], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("together") > 0  # both workers were busy, and no part of the GPU was free
    assert found == {"num_cpus": 1.0, "num_gpus": 0.5, "workers": 2, "failures": {}, "results": 4}


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_more_workers_than_the_machine_holds_still_finish(ray_local, tmp_path):
    """The third process waits for a CPU that the first two keep while they have nothing to do."""
    tasks = [
        TransferTask(name=f"steady{i}", train=Split(uri="/x"), test=Split(uri="/y"), protocol=FineTune(lrs=(0.1,)))
        for i in range(3)
    ]
    actor = ray_local.remote(fragile()).options(max_concurrency=2, num_cpus=1)
    pool = Pool(actor, (str(tmp_path / "mark"),), limit=3, startup_timeout=1.0)
    results = {}
    events = list(Scheduler(tasks, 1, results, pool, costs={task.name: 1.0 for task in tasks}).run())
    assert not [event for event in events if isinstance(event, FailedJob)]
    assert len(results) == 3


# ---------------------------------------------------------------- the command


def run(arguments, cwd, **more):
    return subprocess.run(
        [sys.executable, JOB, *arguments], cwd=cwd, capture_output=True, text=True, timeout=400, **more
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "vtab1k"], "needs --checkpoint"),
        ([], "no complete checkpoint"),
        (["--suite", "vtab1k", "--checkpoint", "RUN", "--data", "DATA"], "16 of 19 tasks cannot run"),
        (["--suite", "vtab1k", "--checkpoint", "RUN", "--data", "DATA", "--tasks", "pet"], 'did you mean "pets"'),
        (["--suite", "vtab1k", "--checkpoint", "TORN", "--data", "DATA", "--tasks", "pets"], "no complete checkpoint"),
        (["--suite", "vtab1k", "--checkpoint", "RUN", "--variant", "B/16", "--data", "DATA"], "B/16"),
        (["--compare", "one"], "--compare takes two runs"),
    ],
)
def test_invalid_requests_are_refused_before_anything_starts(world, tmp_path, monkeypatch, arguments, message):
    torn = tmp_path / "torn" / "checkpoints" / "step-00000001"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").touch()
    step = world / "run" / "checkpoints" / "step-00000001"
    places = {"RUN": str(step), "DATA": str(world / "data"), "TORN": str(tmp_path / "torn")}
    monkeypatch.setattr(sys, "path", sys.path[:])  # the job puts the project first on the path
    main = runpy.run_path(JOB)["main"]
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(UserError) as caught:
        main([places.get(argument, argument) for argument in arguments])
    assert message in str(caught.value)
    assert list((tmp_path / "cwd").iterdir()) == []


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    done = run(["--suite", "vtab2k"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith('error: unknown suite "vtab2k" (did you mean "vtab1k"?)')
    assert len(done.stderr.splitlines()) == 1
    done = run(["--stepz", "3"], tmp_path)
    assert done.returncode == 2
    assert "--steps" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interrupted_command_continues(world, tmp_path):
    settings = config(world, tmp_path / "out", steps=100, seeds=2)
    arguments = ["--json"]
    for field in (
        "suite",
        "checkpoint",
        "data",
        "output",
        "steps",
        "batch_size",
        "resolution",
        "seeds",
        "tracking_uri",
    ):
        arguments += ["--" + field.replace("_", "-"), str(getattr(settings, field))]
    arguments += ["--tasks", *settings.tasks, "--lrs", "0.05"]
    process = subprocess.Popen(
        [sys.executable, JOB, *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs, and so these tests there, have Ctrl-C switched off
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").glob("results/*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 130, stderr
    before = results(tmp_path / "out")
    assert 0 < len(before) < 6
    done = run(arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert list(summary["scores"]) == list(settings.tasks)
    after = results(tmp_path / "out")
    assert len(after) == 6
    assert before.items() <= after.items()
    assert dataclasses.asdict(settings)["output"] == summary["output"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_decontaminated_accuracy_from_raw_images_to_the_report(world, tmp_path):
    """Six test images are among the pre-training images, two of them re-encoded: prepare finds them, and transfer
    reports the accuracy without them."""
    generator = np.random.default_rng(0)

    def photo(path, label):
        picture = cv2.resize(
            generator.integers(0, 200, (6, 6, 3), dtype=np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC
        )
        picture[:, :, label] |= 128
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture)

    for i in range(60):
        photo(tmp_path / "own" / "abc"[i % 3] / f"{i}.png", i % 3)
        photo(tmp_path / "web" / "xy"[i % 2] / f"{i}.png", i % 3)

    def job(name, *arguments):
        command = [sys.executable, str(Path(JOB).with_name(name)), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return done.stdout

    job("prepare.py", "--source", "own", "--output", "sets/own", "--size", 32, "--splits", "train=0.6", "test=0.4")
    seen = open_dataset(tmp_path / "sets/own/test").table(["key"])["key"].to_pylist()[:6]
    for i, key in enumerate(seen):
        copy = cv2.imread(str(tmp_path / "own" / key))
        cv2.imwrite(str(tmp_path / "web" / "x" / f"copy{i}.{'jpg' if i < 2 else 'png'}"), copy)
    job("prepare.py", "--source", "web", "--output", "web-clean", "--size", 32, "--decontaminate", "sets/own/test")
    assert len(open_dataset(tmp_path / "web-clean")) == 60
    arguments = ["--checkpoint", world / "run", "--data", "sets", "--output", "out", "--decontamination", "web-clean"]
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    quick = ["--steps", 30, "--batch-size", 24, "--resolution", SIZE, "--lrs", 0.03, "--tracking-uri", uri]
    stdout = job("transfer.py", "--suite", "folder", *arguments, *quick)
    assert "without seen images)" in stdout
    score = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]["own"]
    assert score["removed"] == 6
    found = unpack_predictions(next((tmp_path / "out").rglob("final-*.parquet")).read_bytes())
    kept = np.array([key not in seen for key in found.keys])
    assert score["values"] == [pytest.approx(100 * found.correct().mean())]
    assert score["clean"] == [pytest.approx(100 * found.correct()[kept].mean())]
    assert "without seen images" in (tmp_path / "out" / "report.md").read_text()
    (run,) = [r for r in search.search_runs("transfer", uri=uri) if "score_clean/own" in r.metrics]
    assert run.metrics["score_clean_mean"] == pytest.approx(score["clean"][0])


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory):
    """All nineteen tasks from miniature archives, prepared."""
    root = tmp_path_factory.mktemp("vtab")
    raw = miniature.write("all", str(root / "raw"))
    with workqueue.without_ray():
        prepare(TASKS, raw, str(root / "sets"))
    return str(root / "sets")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nineteen_tasks_survive_the_death_of_the_driver_and_of_a_worker(world, miniatures, tmp_path):
    """One command over all of VTAB: SIGKILL to the driver; the same command again; SIGKILL to a worker of that one."""
    import mlflow

    output, uri = tmp_path / "out", f"sqlite:///{tmp_path}/mlflow.db"
    arguments = ["--suite", "vtab1k", "--checkpoint", str(world / "run"), "--data", miniatures, "--output", str(output)]
    arguments += ["--steps", "30", "--batch-size", "16", "--resolution", str(SIZE), "--tracking-uri", uri, "--json"]

    def start():
        command = [sys.executable, JOB, *arguments]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for(count, process):
        deadline = time.monotonic() + 300
        while len(done := results(output)) < count:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return done

    first = start()
    wait_for(4, first)
    children = psutil.Process(first.pid).children(recursive=True)
    # Ray's agents notice by polling, a minute later; processes that compute or hold memory end immediately
    children = [child for child in children if not child.name().endswith("Agent")]
    first.kill()
    first.communicate()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive  # no Ray process of a dead driver is left
    kept = results(output)
    assert 4 <= len(kept) < 19

    second = start()
    wait_for(len(kept) + 3, second)
    workers = [p for p in psutil.Process(second.pid).children(recursive=True) if p.name().startswith("ray::Transfer")]
    max(workers, key=lambda p: p.cpu_times().user).kill()
    stdout, stderr = second.communicate(timeout=600)
    assert second.returncode == 0, stderr
    after = results(output)
    assert len(after) == 19
    assert kept.items() <= after.items()  # finished before the kill: not touched
    summary = json.loads(stdout)
    assert list(summary["scores"]) == list(TASKS)
    assert summary["flat_mean"] == pytest.approx(np.mean(list(summary["scores"].values())))
    assert set(summary["group_means"]) == {"natural", "specialized", "structured"}

    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("transfer").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.metrics["score_mean"] == pytest.approx(summary["flat_mean"])
    state = json.loads((output / "run.json").read_text())
    tree = {run.info.run_id: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert set(state["children"].values()) <= set(tree)
    assert {tree[child].info.status for child in state["children"].values()} == {"FINISHED"}
    assert state["recorded"] == dict.fromkeys(TASKS, 1)
