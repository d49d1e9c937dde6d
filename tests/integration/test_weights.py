"""Weights from wherever a user keeps them: a run folder, an MLflow run, the model registry."""

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
