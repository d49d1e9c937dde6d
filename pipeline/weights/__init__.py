"""Weights from files and addresses: local paths, s3://, runs and MLflow.

    report = load_weights(model, "ViT-B_16.npz")       # or .safetensors, .pth, a folder, a run, s3://..., models:/...
    model = load_model("runs/x/checkpoints/step-00001000")
    model, config = open_model("models:/b16_imagenet@candidate")
    save_checkpoint_weights(model, {"classes": [...]}, "out")

`locate` resolves addresses, `checkpoints` finds and verifies committed checkpoints, `description` reads the metadata of
weights, `files` and `folders` read tensors through `pipeline.storage`, and `load` fills models. `models.weights`
translates names and shapes.
"""

from typing import TYPE_CHECKING

from pipeline import lazy
from pipeline.weights.locate import locate, read_config

if TYPE_CHECKING:
    from pipeline.weights.load import (
        load_model,
        load_weights,
        open_model,
        read_weights,
        save_checkpoint_weights,
    )

__all__ = [
    "load_model",
    "load_weights",
    "locate",
    "open_model",
    "read_config",
    "read_weights",
    "save_checkpoint_weights",
]

# Imported on first use: torch takes seconds to import, and finding and checking checkpoints does not need it.
__getattr__ = lazy.exports(
    __name__, {"load": ("load_model", "load_weights", "open_model", "read_weights", "save_checkpoint_weights")}
)
