"""Weights from a run folder, an MLflow run, and the model registry."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch

from models import create_model
from pipeline import storage
from pipeline.data.format import write_dataset
from pipeline.errors import UserError
from pipeline.tracking import registry, search, server
from pipeline.weights import locate, open_model, save_checkpoint_weights
from tests.runs import commit_checkpoint, flip_bit
from tests.weights import google_arrays

PROJECT = Path(__file__).parents[2]


def checkpoint(folder, seed):
    """A committed checkpoint as pre-training leaves it."""
    torch.manual_seed(seed)
    model = create_model("mu/8", 3, 24).eval()
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint_weights(model, {"classes": ["a", "b", "c"]}, str(folder))
    commit_checkpoint(folder, seed)
    return model


def logits(model):
    return model(torch.full((1, 24, 24, 3), 200, dtype=torch.uint8))


def test_a_run_folder_means_its_newest_checkpoint(tmp_path):
    checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001", 1)
    newest = checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002", 2)
    storage.write_json(tmp_path / "run" / "checkpoints" / "step-00000003" / "config.json", {})  # never committed
    model, config = open_model(str(tmp_path / "run"))
    assert torch.equal(logits(model), logits(newest))
    assert config["classes"] == ["a", "b", "c"]
    with pytest.raises(UserError):
        open_model(str(tmp_path / "elsewhere"))


def test_mlflow_run_and_registry(tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    original = checkpoint(tmp_path / "checkpoint", 1)
    client = mlflow.MlflowClient(uri)
    run = client.create_run(client.create_experiment("x", artifact_location=str(tmp_path / "artifacts"))).info.run_id
    client.log_artifacts(run, str(tmp_path / "checkpoint"), "kept/checkpoint")
    assert torch.equal(logits(open_model(f"runs:/{run}/kept/checkpoint", uri)[0]), logits(original))
    version = registry.register(str(tmp_path / "checkpoint"), name="vit", uri=uri).version
    for address in (f"models:/vit/{version}", "models:/vit@candidate"):
        assert torch.equal(logits(open_model(address, uri)[0]), logits(original))
    (logged,) = [path for path in tmp_path.rglob("model.safetensors") if "models" in path.parts]
    flip_bit(logged)
    with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
        open_model("models:/vit@candidate", uri)
    for address in (f"runs:/{run}/nothing", "models:/nobody/1"):
        with pytest.raises(UserError, match=address):
            locate(address, uri)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "COMMIT.json"])
def test_a_damaged_checkpoint_is_not_registered(tmp_path, file):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    checkpoint(tmp_path / "checkpoint", 1)
    flip_bit(tmp_path / "checkpoint" / file, -4)
    with pytest.raises(UserError, match=r"damaged|not valid JSON|invalid"):
        registry.register(str(tmp_path / "checkpoint"), name="vit", uri=uri)
    assert registry.model_names(uri) == []


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_registered_model_with_damaged_weights_does_not_load(tmp_path, file):
    """`mlflow.pyfunc` of a version whose files were damaged in the store of artifacts."""
    import mlflow

    checkpoint(tmp_path / "checkpoint", 1)
    registry.save_classifier(str(tmp_path / "checkpoint"), str(tmp_path / "model"))
    mlflow.pyfunc.load_model(str(tmp_path / "model"))
    (copy,) = (tmp_path / "model").glob(f"**/{file}")
    flip_bit(copy, -4)
    with pytest.raises(ValueError, match=f"{file}: damaged"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))


ALONE = """
import io, sys
for absent in ("pipeline", "ray", "deepspeed"):
    sys.modules[absent] = None  # importing them fails, as where they are not installed
import mlflow, numpy, pandas
from PIL import Image
mlflow.set_tracking_uri(sys.argv[1])
picture = io.BytesIO()
Image.fromarray(numpy.full((30, 40, 3), 200, numpy.uint8)).save(picture, "jpeg")
answer = mlflow.pyfunc.load_model(sys.argv[2]).predict(pandas.DataFrame({"image": [picture.getvalue()] * 2}))
print(answer.to_json())
"""


@pytest.mark.slow
def test_a_registered_model_classifies_where_nothing_of_this_project_is_installed(tmp_path):
    """mlflow.pyfunc in another folder, without ray, deepspeed and pipeline."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    original = checkpoint(tmp_path / "checkpoint", 1)
    version = registry.register(str(tmp_path / "checkpoint"), name="vit", uri=uri)
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-c", ALONE, uri, f"models:/vit/{version.version}"]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = logits(original).softmax(-1)[0]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert set(answer["label"].values()) == {"abc"[expected.argmax()]}
    assert answer["probability"]["0"] == pytest.approx(expected.max().item(), abs=1e-4)
    logged = server.client(uri).get_logged_model(version.model_id)
    assert (logged.status, logged.tags["step"]) == ("READY", "1")
    requirements = (tmp_path / "mlruns").rglob("requirements.txt")
    assert all("+" not in line for file in requirements for line in file.read_text().splitlines())


PRETRAIN = (
    "--optimizer.lr 1e-12 --optimizer.weight-decay 0 --steps 2steps --engine.precision fp32 --model.variant mu/8 "
    "--model.depth None --model.pre-logits --image-size 24 --model.pool token --model.posemb learn --validation None "
    "--workers 1 --augment.size 24 --data sets/own/train --batch-size 8"
)
"""Two steps that change next to nothing."""
TRANSFER = "--suite folder --data sets --lrs 0.01 --steps 4 --batch-size 8 --resolution 24 --json"


@pytest.fixture
def google_file(tmp_path):
    """(model, its weights in a .npz in Google's naming), and two small sets of noise."""
    torch.manual_seed(0)
    model = create_model("mu/8", 3, 24, pre_logits=True)
    np.savez(tmp_path / "vit.npz", **google_arrays(model))
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 24)):
        pictures = generator.integers(0, 255, (count, 24, 24, 3), dtype=np.uint8)
        rows = [
            (f"{i}", cv2.imencode(".png", picture)[1].tobytes(), i % 3, 24, 24) for i, picture in enumerate(pictures)
        ]
        write_dataset(str(tmp_path / "sets" / "own" / split), rows, classes=["a", "b", "c"])
    return model, "vit.npz"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_google_files_and_registered_models_through_the_jobs(google_file, tmp_path):
    """A .npz in Google's naming starts a pre-training; the version that this registers starts another, and a transfer."""
    original, weights = google_file
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def job(name, flags, *arguments):
        command = [sys.executable, str(PROJECT / "jobs" / name), *flags.split(), *arguments, "--tracking-uri", uri]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pretrain(start, output):
        said = job("pretrain.py", PRETRAIN, "--output", output, "--init-from", start)
        state = safetensors.torch.load_file(next((tmp_path / output).rglob("model.safetensors")))
        for name, tensor in original.state_dict().items():
            torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=0)
        return said

    def transfer(output, *arguments):
        return json.loads(job("transfer.py", TRANSFER, "--output", output, *arguments))

    assert "registered=demo-own/1" in pretrain(weights, "run1")
    assert "registered=demo-own/2" in pretrain("models:/demo-own/1", "run2")
    from_npz = transfer("out1", "--checkpoint", weights, "--variant", "mu/8")
    from_registry = transfer("out2", "--checkpoint", "models:/demo-own@candidate")
    assert from_npz["scores"] == from_registry["scores"]
    evaluated = [version for version in registry.versions("demo-own", uri) if version.evaluations]
    (version,) = evaluated  # the scores are recorded at the version that was transferred
    ((key, evaluation),) = version.evaluations.items()
    assert key.startswith("folder:")
    assert evaluation["mean"] == pytest.approx(from_registry["mean"])
    (run,) = [run for run in search.search_runs("transfer", uri=uri) if run.id == from_registry["run_id"]]
    assert run.tags["lineage.pretrain"] == version.run_id
