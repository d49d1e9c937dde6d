"""The jobs on every object store that can be written: sources and datasets, the loader, checkpoints and their resumption."""

import json
import re
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.data import Loader, open_dataset
from pipeline.data.format.verify import verify_dataset
from pipeline.data.loading.augment import Augment
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.operations.doctor import store
from pipeline.weights import checkpoints
from tests import jobprocess, prepared
from tests.faultproxy import FaultProxy
from tests.objectstore import copy_folder

ODD_NAME = "ant/a [1]*?#%20é{0}.jpg"


def batches(uri: str) -> list[tuple[list[str], torch.Tensor]]:
    with Loader(open_dataset(uri), batch_size=10, lanes=2, augment=Augment(size=32)) as loader:
        return [(batch["key"], batch["image"].clone()) for batch in loader]


def test_a_dataset_is_prepared_on_a_store_like_on_disk_and_loaded_despite_faults(
    cloud, image_folder, tmp_path, without_ray, monkeypatch
):
    """Each request of the loader fails once; keys and pixels are those of the dataset on disk."""
    (image_folder / "ant" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    storage.copy_file(image_folder / "ant" / "001.jpg", image_folder / ODD_NAME)
    copy_folder(image_folder, f"{cloud.uri}/raw")
    there, here = f"{cloud.uri}/set", str(tmp_path / "set")
    options = {"size": 40}
    made = prepare(PrepareConfig(source=(f"{cloud.uri}/raw",), output=there, **options))[""]
    same = prepare(PrepareConfig(source=(str(image_folder),), output=here, **options))[""]
    assert (made.rows, made.fingerprint) == (31, same.fingerprint)
    assert verify_dataset(there) == []
    assert {file.path for file in storage.list_files(there)} == {path.name for path in Path(here).iterdir()}
    assert ODD_NAME in open_dataset(there).table()["key"].to_pylist()
    expected = batches(here)
    with FaultProxy(cloud.server) as proxy:
        monkeypatch.setenv(*cloud.at(proxy.endpoint))
        proxy.fault = lambda method, path, n: "503" if n == 1 else None
        found = batches(there)
    failed = " ".join(path for _, path, fault in proxy.log if fault == "503")
    assert "manifest.json" in failed
    assert all(shard.name in failed for shard in made.shards)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(found, expected, strict=True))


def test_the_doctor_checks_what_jobs_need(cloud):
    found = {result.check: result.status for result in store.writable(f"{cloud.uri}/run")}
    wanted = {"output", "multipart upload", "conditional write"}
    assert found == dict.fromkeys(wanted | ({"checksum mode"} if cloud.uri.startswith("s3://") else set()), "ok")
    assert storage.list_files(cloud.uri) == []  # nothing is left behind
    assert "not a finished dataset" in store.readable(f"{cloud.uri}/other").message


def test_the_doctor_names_the_variable_of_a_server_that_is_not_there(cloud, monkeypatch):
    """In the connection string of Azure, it is one of several settings."""
    name = f"{cloud.variable}: BlobEndpoint" if cloud.uri.startswith("az://") else cloud.variable
    monkeypatch.setenv(*cloud.at("http://127.0.0.1:9"))
    assert f"no response from {name}=http://127.0.0.1:9" in store.readable(f"{cloud.uri}/set").message
    monkeypatch.setenv(*cloud.at("http://127.0.0.1:port"))
    assert f"{name}=http://127.0.0.1:port is not a URL" in store.readable(f"{cloud.uri}/set").message


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_jobs_prepare_train_and_resume_on_a_store(cloud, image_folder, tmp_path):
    copy_folder(image_folder, f"{cloud.uri}/raw")
    command = ("--source", f"{cloud.uri}/raw", "--output", f"{cloud.uri}/set", "--size", 40, "--num-cpus", 2, "--json")
    result = prepared.job(*command)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["dataset"]["prepared"] == 30
    training = [
        "--recipe",
        "demo",
        "--data",
        f"{cloud.uri}/set",
        "--validation",
        "None",
        "--output",
        f"{cloud.uri}/run",
    ]
    training += ["--steps", "8", "--batch-size", "8", "--workers", "1", "--model.depth", "1", "--log-every", "1steps"]
    training += ["--checkpoint-every", "2steps", "--validate-every", "8steps"]

    def train() -> str:
        result = jobprocess.job("pretrain", *training, cwd=tmp_path, timeout=400)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    train()
    whole = checkpoints.latest(f"{cloud.uri}/run")
    assert whole.step == 8
    weights = storage.read_bytes(storage.join(whole.uri, "model.safetensors"))
    storage.remove(storage.join(whole.uri, "COMMIT.json"))  # as if it had died before its end
    assert checkpoints.latest(f"{cloud.uri}/run").step == 6
    text = train()
    assert re.search(r"step 7\b|step\s+7/8", text), text
    again = checkpoints.latest(f"{cloud.uri}/run")
    assert again.step == 8
    assert storage.read_bytes(storage.join(again.uri, "model.safetensors")) == weights
