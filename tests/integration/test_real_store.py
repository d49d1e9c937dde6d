"""Prepare, load, checkpoint and resume on OpenStack Swift's S3 interface: a store that was not written to test clients.

Needs its Debian packages (tests/objectstore.py says which); run with `-m slow`. Requests pass through a plain HTTP proxy as they
would through a load balancer: by itself Swift's web server ends answers to HEAD with a stray chunk, which HTTP clients refuse.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.data import Loader, open_dataset
from pipeline.data.format.verify import verify_dataset
from pipeline.data.loading.augment import Augment
from pipeline.weights import checkpoints
from tests.faultproxy import FaultProxy
from tests.objectstore import ACCESS_KEY, SECRET_KEY, copy_folder, make_bucket, swift

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    with swift(tmp_path / "swift") as store, FaultProxy(store) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        }.items():
            monkeypatch.setenv(name, value)
        make_bucket("bucket")
        yield "s3://bucket"


def run(job, *arguments):
    command = [sys.executable, str(PROJECT / "jobs" / f"{job}.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prepare_load_checkpoint_resume(bucket, image_folder, tmp_path):
    copy_folder(image_folder, f"{bucket}/raw")
    (image_folder / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    storage.copy_file(image_folder / "ant" / "broken.jpg", f"{bucket}/raw/ant/broken.jpg")
    options = ("--recipe", "jpeg256", "--size", 40, "--num-cpus", 2, "--json")
    made = json.loads(run("prepare", "--source", f"{bucket}/raw", "--output", f"{bucket}/set", *options))["dataset"]
    assert (made["prepared"], made["rejects_by_reason"]) == (30, {"corrupt": 1})
    here = json.loads(run("prepare", "--source", image_folder, "--output", tmp_path / "set", *options))["dataset"]
    assert made["fingerprint"] == here["fingerprint"]
    assert verify_dataset(f"{bucket}/set") == []
    assert {file.path for file in storage.list_files(f"{bucket}/set")} == {
        path.name for path in (tmp_path / "set").iterdir()
    }

    batches = {}
    for uri in (f"{bucket}/set", str(tmp_path / "set")):
        augment = Augment(size=32)
        with Loader(open_dataset(uri), batch_size=10, lanes=2, augment=augment) as loader:
            batches[uri] = [(batch["key"], batch["image"].clone()) for batch in loader]
    there, on_disk = batches.values()
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(there, on_disk, strict=True))

    training = ["--recipe", "demo", "--data", f"{bucket}/set", "--validation", "None", "--output", f"{bucket}/run"]
    training += ["--steps", "8", "--batch-size", "8", "--workers", "1", "--model.depth", "1", "--log-every", "1steps"]
    training += ["--checkpoint-every", "2steps", "--validate-every", "8steps"]
    run("pretrain", *training)
    whole = checkpoints.latest(f"{bucket}/run")
    assert whole.step == 8
    weights = storage.read_bytes(storage.join(whole.uri, "model.safetensors"))
    storage.remove(
        storage.join(whole.uri, "COMMIT.json")
    )  # as if it had died before its end: the checkpoint does not exist
    assert checkpoints.latest(f"{bucket}/run").step == 6
    text = run("pretrain", *training)
    assert re.search(r"step 7\b|step\s+7/8", text), text
    again = checkpoints.latest(f"{bucket}/run")
    assert again.step == 8
    assert storage.read_bytes(storage.join(again.uri, "model.safetensors")) == weights
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text
