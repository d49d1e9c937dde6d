"""Weights from wherever a user keeps them: a run folder, an MLflow run, the model registry."""

import json
import subprocess
import sys

import pytest
import torch

from models import create_model
from models.convert import save_checkpoint_weights
from pipeline import storage
from pipeline.errors import UserError
from pipeline.weights import locate, open_model


def checkpoint(folder, seed):
    """A committed checkpoint as pre-training leaves it."""
    torch.manual_seed(seed)
    model = create_model("mu/8", 3, 24).eval()
    torch.nn.init.normal_(model.head.weight)
    save_checkpoint_weights(model, {"classes": ["a", "b", "c"]}, str(folder))
    files = {file.path: {"size": file.size, "sha256": ""} for file in storage.list_files(folder)}
    storage.write_json(storage.join(folder, "COMMIT.json"), {"step": seed, "files": files})
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

    from pipeline.tracking import registry

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    original = checkpoint(tmp_path / "checkpoint", 1)
    client = mlflow.MlflowClient(uri)
    run = client.create_run(client.create_experiment("x", artifact_location=str(tmp_path / "artifacts"))).info.run_id
    client.log_artifacts(run, str(tmp_path / "checkpoint"), "kept/checkpoint")
    assert torch.equal(logits(open_model(f"runs:/{run}/kept/checkpoint", uri)[0]), logits(original))
    version = registry.register(str(tmp_path / "checkpoint"), name="vit", uri=uri).version
    for address in (f"models:/vit/{version}", "models:/vit@candidate"):
        assert torch.equal(logits(open_model(address, uri)[0]), logits(original))
    for address in (f"runs:/{run}/nothing", "models:/nobody/1"):
        with pytest.raises(UserError, match=address):
            locate(address, uri)


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
    from pipeline.tracking import registry

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
    logged = registry.client(uri).get_logged_model(version.model_id)
    assert (logged.status, logged.tags["step"]) == ("READY", "1")
    requirements = (tmp_path / "mlruns").rglob("requirements.txt")
    assert all("+" not in line for file in requirements for line in file.read_text().splitlines())
