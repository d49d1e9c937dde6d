"""An object store is unavailable while jobs read from it: requests are retried, then the attempt fails, and the error
is not reported as wrong input. The jobs are processes that connect to a real S3
server over HTTP, through a proxy that resets their connections."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pyarrow as pa
import pytest
import torch

from models import create_model
from pipeline.data.format import write_dataset
from pipeline.errors import StorageError
from pipeline.weights import checkpoints, save_checkpoint_weights
from tests.faultproxy import FaultProxy
from tests.objectstore import copy_folder
from tests.runs import commit_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = "--model.variant mu/8 --image-size 16 --augment.size 16 --batch-size 8 --lanes 4 --workers 1 --validation None"
PRETRAIN = f"--data S3/sets/own/train --output S3/out {SMALL} --steps 400steps --log-every 1steps --register None"
JOBS = {
    "prepare": "--source S3/images --output S3/out --size 16 --num-cpus 2 --no-tracking",
    "pretrain": f"{PRETRAIN} --checkpoint-every 20steps",
    "transfer": "--checkpoint S3/run --suite folder --data S3/sets --output S3/out --steps 20 --batch-size 8 --lrs 0.01",
    "evaluate": "--runs S3/run --suite folder --data S3/sets --output S3/out --transfer.steps 20 --transfer.batch-size 8 "
    "--transfer.lrs 0.01",
}
WORK = {"prepare": r"images/.*\.png", **dict.fromkeys(("pretrain", "transfer", "evaluate"), r"train/part-.*\.parquet")}
"""The requests of each job's workers."""


class Outage:
    """An outage of the store behind the proxy: it begins with request number `begin` for a matching path, and ends when
    `over` is set."""

    def __init__(self, pattern: str, begin: int) -> None:
        self.pattern, self.begin, self.over = re.compile(pattern), begin, False
        self.seen = self.refused = 0

    def __call__(self, method: str, path: str, n: int) -> str | None:
        self.seen += bool(self.pattern.search(path)) and method == "GET"
        away = self.seen >= self.begin and not self.over
        self.refused += away
        return "reset" if away else None


@pytest.fixture
def store(s3, s3_server, monkeypatch) -> Iterator[tuple[str, FaultProxy]]:
    """A bucket with pictures, data sets and a run of one checkpoint; and the proxy that the jobs use as their
    endpoint."""
    pictures = np.random.default_rng(0).integers(0, 255, (64, 20, 20, 3), dtype=np.uint8)
    files = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
    rows = [(f"{i:02d}", data, i % 4, 20, 20) for i, data in enumerate(files)]
    for split in ("train", "test"):
        write_dataset(f"{s3}/sets/own/{split}", rows, classes=list("abcd"), row_group_bytes=12_000)
    from pipeline import storage

    for i, data in enumerate(files):
        storage.write_bytes(f"{s3}/images/{'abcd'[i % 4]}/{i}.png", data)
    torch.manual_seed(0)
    folder = checkpoints.folder(f"{s3}/run", 7)
    save_checkpoint_weights(create_model("mu/8", 4, 16), {"classes": list("abcd")}, folder)
    commit_checkpoint(folder, 7)
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield s3, proxy


def start(job: str, bucket: str, folder: Path, patience: float) -> tuple[subprocess.Popen, Path]:
    """The job as a process, and its log."""
    log = folder / "log"
    tracking = [] if "--no-tracking" in JOBS[job] else ["--tracking-uri", f"sqlite:///{folder}/mlflow.db"]
    command = [sys.executable, f"jobs/{job}.py", *JOBS[job].replace("S3", bucket).split(), *tracking]
    environment = {**os.environ, "VIT_STORE_PATIENCE": str(patience), "VIT_SPOOL": str(folder / "spool")}
    with open(log, "w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out), log


def until(log: Path, pattern: str, seconds: float = 800) -> None:
    deadline = time.monotonic() + seconds
    while not re.search(pattern, log.read_text(errors="replace")):
        assert time.monotonic() < deadline, f"no {pattern}:\n{log.read_text()}"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("job", JOBS)
def test_job_waits_for_the_end_of_an_outage(store, tmp_path, job):
    bucket, proxy = store
    proxy.fault = outage = Outage(WORK[job], begin=3)
    process, log = start(job, bucket, tmp_path, patience=120)
    try:
        while outage.refused < 20 and process.poll() is None:
            time.sleep(0.2)
        outage.over = True
        assert process.wait(800) == 0, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    assert outage.refused >= 20
    assert "starting again" not in text
    assert "Traceback" not in text


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_outage_longer_than_the_patience_fails_the_attempt_and_training_continues(store, tmp_path):
    bucket, proxy = store
    proxy.fault = outage = Outage(WORK["pretrain"], begin=5)
    process, log = start("pretrain", bucket, tmp_path, patience=3)
    try:
        until(log, r"starting again from the last checkpoint \(failure 1 of at most 3 in a row\)")
        outage.over = True
        assert process.wait(800) == 0, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    assert re.search(r"WARNING worker 0: Unavailable: s3://.*no answer after \d+ attempts? in 3 s", text)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("pretrain").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, 401))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("job", JOBS)
def test_endless_outage_is_a_failure_and_not_wrong_input(store, tmp_path, job):
    bucket, proxy = store
    proxy.fault = Outage(WORK[job], begin=3)
    process, log = start(job, bucket, tmp_path, patience=2)
    try:
        assert process.wait(800) == 75, log.read_text()
    finally:
        process.kill()
    text = log.read_text()
    assert re.search(r"s3://\S+: no answer after \d+ attempts? in 2 s", text)
    assert "Traceback" not in text
    proxy.fault = lambda method, path, n: None
    again, log = start(job, bucket, tmp_path, patience=60)
    assert again.wait(800) == 0, log.read_text()


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("what", ["find", "latest", "survey"])
def test_checkpoint_that_is_unreadable_in_an_outage_is_not_called_damaged(store, monkeypatch, what):
    from pipeline.training import checkpoint

    bucket, proxy = store
    monkeypatch.setenv("VIT_STORE_PATIENCE", "0.3")
    proxy.fault = Outage(r"step-00000007/", begin=1)
    with pytest.raises(StorageError, match="no answer"):
        getattr(checkpoint, what)(f"{bucket}/run")
    proxy.fault = lambda method, path, n: None
    assert checkpoint.latest(f"{bucket}/run").step == 7


def test_suite_keeps_its_version_in_an_outage(store, monkeypatch):
    from pipeline.transfer.suites import TransferConfig, suite_version

    bucket, proxy = store
    config = TransferConfig(suite="folder", data=f"{bucket}/sets")
    version = suite_version(config)
    monkeypatch.setenv("VIT_STORE_PATIENCE", "0.3")
    proxy.fault = Outage(r"manifest\.json", begin=1)
    with pytest.raises(StorageError, match="no answer"):
        suite_version(config)
    proxy.fault = lambda method, path, n: None
    assert suite_version(config) == version


@pytest.mark.parametrize("what", ["archives", "lists"])
def test_tasks_of_vtab_have_no_problem_in_an_outage(store, vtab_raw, monkeypatch, tmp_path, what):
    from pipeline import storage
    from pipeline.vtab.plan import Request, plan_tasks

    bucket, proxy = store
    storage.copy_file(f"{vtab_raw}/MINIATURE.json", f"{bucket}/raw/MINIATURE.json")
    if what == "archives":
        copy_folder(f"{vtab_raw}/dtd", f"{bucket}/raw/dtd")
    else:
        for split in ("train800", "val200", "test"):
            storage.write_bytes(f"{bucket}/raw/dtd/{split}.txt", b"a.jpg 0")
    request = Request(task="dtd", raw=f"{bucket}/raw", output=str(tmp_path), splits=("train800", "test"), verify=False)
    assert plan_tasks([request])[1] == {}
    monkeypatch.setenv("VIT_STORE_PATIENCE", "0.3")
    proxy.fault = Outage(r"\.tar|train800\.txt", begin=1)
    with pytest.raises(StorageError, match="no answer"):
        plan_tasks([request])


@pytest.mark.parametrize("begin", [1, 2, 3])
def test_columns_that_cannot_be_read_in_an_outage_are_not_wrong(store, monkeypatch, begin):
    from pipeline import storage
    from pipeline.data import sources

    bucket, proxy = store
    image = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    table = pa.table({"image": [image] * 20_000, "set": ["train", "test"] * 10_000, "label": ["a", "b"] * 10_000})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    storage.write_bytes(f"{bucket}/tables/rows.arrow", sink.getvalue().to_pybytes())
    monkeypatch.setenv("VIT_STORE_PATIENCE", "0.3")
    proxy.fault = outage = Outage(r"rows\.arrow", begin=begin)
    with pytest.raises(StorageError, match="no answer"):
        sources.discover([f"{bucket}/tables"])
    assert outage.refused


def test_model_card_does_not_say_in_an_outage_that_files_cannot_be_read(store, monkeypatch):
    from pipeline.tracking.card import collect_facts

    bucket, proxy = store
    folder = checkpoints.folder(f"{bucket}/run", 7)
    facts = collect_facts(folder, {"step": 7})
    monkeypatch.setenv("VIT_STORE_PATIENCE", "0.3")
    proxy.fault = Outage(r"config\.json", begin=1)
    with pytest.raises(StorageError, match="no answer"):
        collect_facts(folder, {"step": 7})
    proxy.fault = lambda method, path, n: None
    assert collect_facts(folder, {"step": 7}) == facts


def test_results_of_a_suite_are_not_computed_again_in_an_outage(store, monkeypatch):
    from pipeline import storage
    from pipeline.transfer.store import Store

    bucket, proxy = store
    storage.write_bytes(f"{bucket}/scores/results/dtd/lr-0.1.json", b"{}")
    monkeypatch.setenv("VIT_STORE_PATIENCE", "0.3")
    proxy.fault = Outage(r"results/dtd/lr", begin=1)
    with pytest.raises(StorageError, match="no answer"):
        Store(f"{bucket}/scores").load_all()


@pytest.mark.parametrize("patience", ["soon", "-1", "nan", "1e400"])
def test_patience_must_be_a_number_of_seconds(monkeypatch, patience):
    from pipeline import retry
    from pipeline.errors import UserError

    monkeypatch.setenv("VIT_STORE_PATIENCE", patience)
    with pytest.raises(UserError, match=f"VIT_STORE_PATIENCE={patience}: give seconds"):
        retry.longest_patience()
