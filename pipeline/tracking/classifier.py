"""The model that `mlflow.pyfunc.load_model` returns: it maps encoded images to classes and probabilities.

MLflow copies this file into every registered model (as code, without pickle) together with the package `models` and the
weights of the checkpoint. Serving needs torch, safetensors, numpy, pandas and Pillow, but not Ray, DeepSpeed or the
rest of this project.
"""

import hashlib
import io
import json
import os
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image
from safetensors.torch import load

from models import create_model


class Classifier(PythonModel):
    """A column `image` of JPEG, PNG, ... bytes -> columns `label`, `index`, `probability`."""

    def load_context(self, context: Any) -> None:
        folder = context.artifacts["checkpoint"]
        with open(os.path.join(folder, "COMMIT.json")) as file:
            recorded = json.load(file)["files"]
        config = json.loads(_read(folder, "config.json", recorded))
        self.model = create_model(**config["model"]).eval()
        self.model.load_state_dict(load(_read(folder, "model.safetensors", recorded)))
        self.size = int(config["model"]["image_size"])
        self.channels = int(config["model"].get("channels", 3))
        # trained with one sigmoid per class (multi-label data) or with a softmax
        self.multilabel = config.get("pretrain", {}).get("loss") == "sigmoid"
        self.classes = config.get("classes") or [str(index) for index in range(int(config["model"]["num_classes"]))]

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict | None = None) -> pd.DataFrame:
        images = [self._pixels(data) for data in model_input["image"]]
        with torch.inference_mode():
            parts = [self.model(torch.from_numpy(np.stack(images[i : i + 64]))) for i in range(0, len(images), 64)]
        logits = torch.cat(parts).float()
        probability, index = (logits.sigmoid() if self.multilabel else logits.softmax(-1)).max(-1)
        labels = [self.classes[i] for i in index.tolist()]
        return pd.DataFrame({"label": labels, "index": index.numpy(), "probability": probability.double().numpy()})

    def _pixels(self, data: bytes) -> np.ndarray:
        """uint8 (size, size, channels): the shorter side resized to 8/7 of the size,
        then a centre crop, as in validation."""
        image = Image.open(io.BytesIO(data)).convert("L" if self.channels == 1 else "RGB")
        scale = self.size * 8 / 7 / min(image.size)
        wide, high = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        resized = image.resize((wide, high), Image.Resampling.BILINEAR)
        return np.asarray(resized.crop((left, top, left + self.size, top + self.size))).reshape(
            self.size, self.size, -1
        )


def _read(folder: str, name: str, recorded: dict[str, Any]) -> bytes:
    """A file of the checkpoint. Raises ValueError if it does not match its checksum."""
    path = os.path.join(folder, name)
    with open(path, "rb") as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != recorded[name]["sha256"]:
        raise ValueError(f"{path}: damaged: it does not match its checksum in COMMIT.json; download the model again")
    return data


set_model(Classifier())
