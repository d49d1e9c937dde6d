"""Models that a suite can transfer: models of this project, of timm and of Hugging Face's transformers.

    backbone = open_backbone("runs/demo/pretrain")                       a checkpoint, a run, models:/..., runs:/...
    backbone = open_backbone("timm:vit_base_patch16_224@weights.safetensors")
    backbone = open_backbone("hf:folder")                                 config.json, weights, preprocessor_config.json
    features = backbone.features(images)                                  uint8 (B,H,W,3) -> (B,D)

Each is a module with `features(x)`, `replace_head(classes)`, `set_image_size(side)`, `config`, `mean` and `std`. It
normalises uint8 images with `mean` and `std` itself. `build_model(config, arrays)` builds the model in another process.
timm and transformers are optional: pip install -c constraints.txt -e '.[export]'.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from models import create_model
from pipeline import storage
from pipeline.errors import UserError
from pipeline.libraries import import_library
from pipeline.weights import open_model

TIMM, HUGGING_FACE = "timm:", "hf:"
LIBRARIES = (TIMM, HUGGING_FACE)
HALF = (0.5, 0.5, 0.5)
RANDOM_POOLER = ("vit", "deit")  # model types whose weight files have no pooling layer

logger = logging.getLogger(__name__)


def open_backbone(name: str, tracking_uri: str | None = None) -> Any:
    """The pre-trained model of this name, in eval mode on the CPU.

    name: timm:NAME (pre-trained weights from timm's hub), timm:NAME@FILE (from a local file), hf:FOLDER (a local folder of
    transformers), or any checkpoint that `pipeline.weights.open_model` accepts. Raises UserError if the library, the
    model or its weights are missing.
    """
    if name.startswith(TIMM):
        return _open_timm(name.removeprefix(TIMM))
    if name.startswith(HUGGING_FACE):
        return _open_hugging_face(name.removeprefix(HUGGING_FACE))
    model: Any = open_model(name, tracking_uri)[0]
    model.mean, model.std = HALF, HALF
    return model


def build_model(config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    """The model of `config` with these weights. The arrays may be read-only, since
    Ray shares them between processes."""
    library = config.get("library")
    if library == "timm":
        model: Any = TimmBackbone(import_library("timm").create_model(config["name"], num_classes=0), config)
    elif library == "transformers":
        transformers = import_library("transformers")
        options = transformers.AutoConfig.for_model(**config["options"])
        model = HuggingFaceBackbone(transformers.AutoModel.from_config(options, **_pooling(options)), config)
    else:
        model = create_model(**config)
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return model


class LibraryBackbone(nn.Module):
    """Adapts a network of another library to the interface of transfer. `network`
    maps images (B,3,H,W) to features (B,D)."""

    def __init__(self, network: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.network: Any = network
        self.config = dict(config)
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.head: nn.Module = nn.Identity()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 images (B,H,W,3), or normalised float images (B,3,H,W) -> (B,D)."""
        if x.dtype == torch.uint8:
            mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
            x = (x.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return self.pooled(x)

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B,K)."""
        return self.head(self.features(x))

    def replace_head(self, num_classes: int) -> None:
        """A new linear head with zero weights."""
        self.head = nn.Linear(self.config["width"], num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.to(next(self.network.parameters()))

    def set_image_size(self, size: int) -> None:
        self.config["image_size"] = size


class TimmBackbone(LibraryBackbone):
    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)

    def set_image_size(self, size: int) -> None:
        """Lets timm resize the position embeddings. Raises UserError for a model with a fixed image size."""
        if size != self.config["image_size"] and hasattr(self.network, "set_input_size"):
            self.network.set_input_size(img_size=(size, size))
        elif size != self.config["image_size"] and self.config["fixed_size"]:
            native = self.config["image_size"]
            raise UserError(f"{self.config['variant']} only accepts images of {native} px; use --resolution {native}")
        super().set_image_size(size)


class HuggingFaceBackbone(LibraryBackbone):
    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        resized = {}
        if "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters:
            resized["interpolate_pos_encoding"] = True
        output = self.network(pixel_values=x, **resized)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def _open_timm(name: str) -> TimmBackbone:
    timm = import_library("timm")
    name, _, file = name.partition("@")
    if not name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.partition('.')[0]}*")[:5])
        raise UserError(f'timm has no model "{name}"{f"; similar: {close}" if close else ""}; see timm.list_models()')
    overlay = {"file": storage.normalise(file)} if file else None
    if file and not storage.exists(file):
        raise UserError(f"{file}: no such file (weights for {TIMM}{name})")
    if file and not storage.is_remote(file):
        storage.refuse_special(storage.normalise(file))
    if name.startswith("local-dir:"):
        storage.refuse_special_files(name.removeprefix("local-dir:"))
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except Exception as error:  # errors of the hub's client, torch and timm have no common class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        remedy = "is it a file of this model?" if file else f"offline, give a file: {TIMM}{name}@FILE"
        raise UserError(f"{TIMM}{name}: its weights cannot be loaded ({reason}); {remedy}") from error
    settings = network.pretrained_cfg
    size = int(settings["input_size"][-1])
    config: dict[str, Any] = {
        "library": "timm",
        "name": name,
        "variant": f"{TIMM}{name}",
        "image_size": size,
        "fixed_size": bool(settings.get("fixed_input_size", False)),
        "patch_size": _patch_size(network),
        "width": int(network.num_features),
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
    }
    with torch.no_grad():  # some models project their features
        config["width"] = network.eval()(torch.zeros(1, 3, size, size)).shape[-1]
    return TimmBackbone(network, config).eval()


def _patch_size(network: Any) -> int | None:
    size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    return int(size[0]) if isinstance(size, tuple) else size


def _open_hugging_face(folder: str) -> HuggingFaceBackbone:
    place = storage.normalise(folder)
    if storage.is_remote(place) or not storage.exists(storage.join(place, "config.json")):
        raise UserError(
            f"{HUGGING_FACE}{folder}: not a local folder with a config.json of transformers; download one with "
            "`hf download NAME --local-dir FOLDER`"
        )
    storage.refuse_special_files(place)
    transformers = import_library("transformers")
    try:
        options = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
        network, found = transformers.AutoModel.from_pretrained(
            place, config=options, local_files_only=True, output_loading_info=True, **_pooling(options)
        )
    except Exception as error:  # errors of transformers, safetensors and torch have no common class
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{HUGGING_FACE}{folder}: cannot be loaded ({reason})") from error
    if found["missing_keys"]:
        names = ", ".join(sorted(found["missing_keys"])[:5])
        raise UserError(f"{HUGGING_FACE}{folder}: the weights have no {names}; is the file complete?")
    size = getattr(options, "image_size", None) or 224
    size = int(size[0]) if isinstance(size, list | tuple) else int(size)
    mean, std = _hugging_face_normalisation(place)
    config: dict[str, Any] = {
        "library": "transformers",
        "variant": f"{HUGGING_FACE}{folder.rstrip('/').rpartition('/')[2]}",
        "image_size": size,
        "patch_size": getattr(options, "patch_size", None),
        "options": options.to_dict(),
        "width": 0,
        "mean": mean,
        "std": std,
    }
    model = HuggingFaceBackbone(network, config).eval()
    with torch.no_grad():
        model.config["width"] = model.pooled(torch.zeros(1, 3, size, size)).shape[-1]
    return model


def _pooling(options: Any) -> dict[str, bool]:
    return {"add_pooling_layer": False} if options.model_type in RANDOM_POOLER else {}


def _hugging_face_normalisation(place: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation from preprocessor_config.json; 0.5 if there is no such file."""
    uri = storage.join(place, "preprocessor_config.json")
    if not storage.exists(uri):
        logger.warning("%s: no preprocessor_config.json; images are normalised with mean 0.5 and std 0.5", place)
        return list(HALF), list(HALF)
    values = storage.read_json(uri)
    try:
        return [float(v) for v in values["image_mean"]], [float(v) for v in values["image_std"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{uri}: image_mean and image_std are not lists of numbers") from error
