"""Exports models for other libraries, and verifies the export by loading it there and comparing logits.

Every exported model takes float images (B,C,H,W) in [-1, 1], which is pixels / 127.5 - 1. To add a format, write a
function and add it to EXPORTERS."""

import copy
import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from models import create_model
from models.weights import to_huggingface, to_timm
from pipeline import storage
from pipeline.libraries import import_library
from pipeline.weights import load_model, save_checkpoint_weights

logger = logging.getLogger(__name__)

Predict = Callable[[Tensor], Tensor]
"""Normalised images (B,C,H,W) -> logits (B,K), or features (B,D)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Comparison of the outputs of the exported model and the original."""

    what: str
    """"logits" or "features"."""
    images: int
    max_difference: float
    """Largest absolute difference."""
    max_value: float
    """Largest absolute value of the original output."""
    same_argmax: int
    """Number of images with the same argmax."""

    def within(self, tolerance: float) -> bool:
        """Whether the difference is at most `tolerance`, relative to the largest output (at least 1)."""
        return self.max_difference <= tolerance * max(1.0, self.max_value)


def export(model: nn.Module, config: dict[str, Any], form: str, folder: str, images: Tensor) -> Parity:
    """Exports a model to a local folder, loads it with the target library, and compares both on uint8 images (B,H,W,C).

    config: config.json of the checkpoint. form: a key of EXPORTERS. Raises UserError if the format cannot express the
    model."""
    x = images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
    ours, theirs = EXPORTERS[form](model, config, folder)
    expected, found = ours(x), theirs(x)
    return Parity(
        what="logits" if expected.shape[1] == model.config["num_classes"] else "features",  # type: ignore[index]
        images=len(x),
        max_difference=(expected - found).abs().max().item(),
        max_value=expected.abs().max().item(),
        same_argmax=int((expected.argmax(dim=1) == found.argmax(dim=1)).sum()),
    )


# ---------------------------------------------------------------- formats: (model, config, folder) -> (ours, theirs)


def export_timm(model: nn.Module, config: dict[str, Any], folder: str) -> tuple[Predict, Predict]:
    weights, about = to_timm(model)
    timm = import_library("timm")
    _save(weights, folder)
    storage.write_json(storage.join(folder, "config.json"), about)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    options: Any = model.config
    if options.get("epsilons", "timm") != "timm" and "R" in options["variant"]:
        logger.info("timm uses other epsilons in convolutional stages; the comparison uses timm's")
        ours = create_model(**{**options, "epsilons": "timm"}).eval()
        ours.load_state_dict(model.state_dict())
    else:
        ours = copy.deepcopy(model)
    if about["num_classes"] == 0:  # an encoder without a head
        ours.pre_logits = nn.Identity()
        return ours.features, theirs
    return ours, theirs


def export_huggingface(model: nn.Module, config: dict[str, Any], folder: str) -> tuple[Predict, Predict]:
    weights, about, processor = to_huggingface(model, config.get("classes"))
    transformers = import_library("transformers")
    _save(weights, folder)
    storage.write_json(storage.join(folder, "config.json"), about)
    storage.write_json(storage.join(folder, "preprocessor_config.json"), processor)
    architecture = getattr(transformers, about["architectures"][0])
    theirs, loading = architecture.from_pretrained(folder, output_loading_info=True)
    wrong = {key: names for key, names in loading.items() if names and key.endswith("_keys")}
    if wrong:
        raise RuntimeError(f"transformers did not load all tensors: {wrong}")
    theirs.eval()
    if about["architectures"] == ["ViTModel"]:
        features: Any = model.features
        return features, lambda x: theirs(x).pooler_output
    return model, lambda x: theirs(x).logits


def export_onnx(model: nn.Module, config: dict[str, Any], folder: str) -> tuple[Predict, Predict]:
    onnxruntime = import_library("onnxruntime")
    import_library("onnxscript")
    path = os.path.join(folder, "model.onnx")
    torch.onnx.export(
        model,
        (_example(model),),
        path,
        dynamo=True,
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    _describe_input(config, folder)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return model, lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def export_torch(model: nn.Module, config: dict[str, Any], folder: str) -> tuple[Predict, Predict]:
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(model, (_example(model),), dynamic_shapes={"x": batch})
    path = os.path.join(folder, "model.pt2")
    content = io.BytesIO()  # on a full disk, writing the file itself would raise an error without a class of its own
    torch.export.save(program, content)
    storage.write_bytes(path, content.getvalue())
    _describe_input(config, folder)
    return model, torch.export.load(path).module()


def export_safetensors(model: nn.Module, config: dict[str, Any], folder: str) -> tuple[Predict, Predict]:
    save_checkpoint_weights(model, {**config, "model": model.config}, folder)
    return model, load_model(folder)


EXPORTERS: dict[str, Callable[[nn.Module, dict[str, Any], str], tuple[Predict, Predict]]] = {
    "timm": export_timm,
    "huggingface": export_huggingface,
    "onnx": export_onnx,
    "torch-export": export_torch,
    "safetensors": export_safetensors,
}


def _example(model: nn.Module) -> Tensor:
    config: Any = model.config
    return torch.zeros(2, config["channels"], config["image_size"], config["image_size"])


def _save(weights: dict[str, Tensor], folder: str) -> None:
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    # not save_file: its error on a full disk is no OSError
    storage.write_bytes(os.path.join(folder, "model.safetensors"), safetensors.torch.save(contiguous, {"format": "pt"}))


def _describe_input(config: dict[str, Any], folder: str) -> None:
    about = {"input": "float32 (B,C,H,W), pixels / 127.5 - 1", **config}
    storage.write_json(storage.join(folder, "config.json"), about)
