"""Weights from files and addresses: local paths, s3://, runs and MLflow.

    report = load_weights(model, "ViT-B_16.npz")       # or .safetensors, .pth, a folder, a run, s3://..., models:/...
    model = load_model("runs/x/checkpoints/step-00001000")
    model, config = open_model("models:/vit@candidate")
    save_checkpoint_weights(model, {"classes": [...]}, "out")

`checkpoints` finds and verifies committed checkpoints, `locate` turns addresses into places, `files` and `folders` read
tensors through `pipeline.storage`, `load` fills models. Names and shapes are the business of `models.weights`.
"""

from pipeline.weights.load import (
    load_model,
    load_weights,
    open_model,
    read_config,
    read_weights,
    save_checkpoint_weights,
)
from pipeline.weights.locate import locate

__all__ = [
    "load_model",
    "load_weights",
    "locate",
    "open_model",
    "read_config",
    "read_weights",
    "save_checkpoint_weights",
]
