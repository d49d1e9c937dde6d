"""What --checkpoint names -> weights that processes can share."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from models import create_model
from pipeline import storage
from pipeline.config import fingerprint
from pipeline.errors import UserError
from pipeline.tracking import artifacts, registry
from pipeline.tracking.names import RANDOM
from pipeline.transfer.backbones import LIBRARIES, open_backbone
from pipeline.transfer.suites import TransferConfig
from pipeline.weights import checkpoints, load_model, load_weights, read_config, read_weights
from pipeline.weights.description import SUFFIXES


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A pre-trained model, ready to be shared between processes (`backbones.build_model`)."""

    uri: str
    identity: str
    """Of the weights: a fingerprint of their content, or of parts of it."""
    config: dict[str, Any]
    """The model's options; `variant` and `image_size` among them."""
    arrays: dict[str, np.ndarray]
    run_id: str | None = None
    """MLflow run of the pre-training."""
    images_seen: int | None = None
    """Images that the weights have been trained on, where the checkpoint says it."""


def load_checkpoint(config: TransferConfig) -> Checkpoint:
    """The weights that --checkpoint names, checked. Raises UserError when they are missing, incomplete or do not fit."""
    uri = config.checkpoint or ("runs/demo/pretrain" if config.suite == "demo" else None)
    if uri is None:
        raise UserError(
            f"suite {config.suite} needs --checkpoint: a checkpoint or run folder, timm:NAME, hf:FOLDER, or weights with "
            "--variant"
        )
    if uri.startswith(RANDOM):
        return _random_encoder(load_checkpoint(replace(config, checkpoint=uri.removeprefix(RANDOM))))
    if uri.startswith(LIBRARIES):
        if config.variant:
            raise UserError(f"--variant is for bare weights; {uri} says its architecture itself")
        model = open_backbone(uri)
        arrays = _arrays(model)
        return Checkpoint(uri, fingerprint([model.config["variant"], _content(arrays)]), dict(model.config), arrays)
    run_id = images_seen = None
    if uri.startswith(artifacts.SCHEMES):
        place = artifacts.fetch(uri, config.tracking_uri)
        if registered := registry.version_at(uri, config.tracking_uri):
            uri, run_id = registered.checkpoint, registered.run_id or None
    else:
        uri = place = storage.normalise(uri)
    if config.variant:
        model, identity = _bare_model(config.variant, place), _file_identity(place)
    elif place.endswith(SUFFIXES) or storage.exists(storage.join(place, "MLmodel")):
        read_config(place)  # says what is missing when there is no config.json beside it
        model, identity = load_model(place), _file_identity(place)
    else:
        found = checkpoints.resolve(place)
        uri = found.uri
        record = storage.join(uri.rpartition("/checkpoints/")[0] or uri, "run.json")  # of the pre-training run
        run_id = recorded_run(record) if storage.exists(record) else None
        masked = {"mpp": None} if read_config(uri)["model"].get("mpp") else {}  # its encoder is what transfers
        model = load_model(uri, **masked)
        identity = found.commit["files"]["model.safetensors"]["sha256"]
        images_seen = found.commit.get("images_seen")
    return Checkpoint(uri, fingerprint(identity), dict(model.config), _arrays(model), run_id, images_seen)


def _random_encoder(trained: Checkpoint) -> Checkpoint:
    """The same architecture with the weights that training would have begun with. Raises UserError for another library's."""
    if "library" in trained.config:
        raise UserError(f"{RANDOM}{trained.uri}: only models of this project can be initialised anew")
    torch.manual_seed(0)
    arrays = _arrays(create_model(**trained.config))
    return Checkpoint(f"{RANDOM}{trained.uri}", fingerprint([RANDOM, trained.config]), trained.config, arrays)


def _arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def _content(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def recorded_run(uri: str) -> str | None:
    record = storage.read_json(uri)
    run_id = record.get("run_id") if isinstance(record, dict) else None
    return run_id if isinstance(run_id, str) else None


def _bare_model(variant: str, place: str) -> Any:
    """A model of the named architecture with weights that do not say it themselves."""
    state = read_weights(place).weights
    model = create_model(variant, num_classes=0, image_size=_native_size(variant, state))
    if "pre_logits.fc.weight" in state:  # features are what comes after it
        model = create_model(variant, 0, model.config["image_size"], pre_logits=True)
    load_weights(model, place)
    return model


def _native_size(variant: str, state: Mapping[str, Any]) -> int:
    """The resolution that bare weights were trained at, from their number of position embeddings; else 224."""
    if "pos_embed" not in state or "/" not in variant:
        return 224
    positions = state["pos_embed"].shape[1]
    grid = round((positions - 1) ** 0.5)
    return int(variant.rpartition("/")[2]) * (grid if grid**2 == positions - 1 else round(positions**0.5))


def _file_identity(uri: str) -> list[Any]:
    """Size and ends of a weights file, or of those in a folder: enough to tell two apart without reading gigabytes."""
    if files := storage.list_files(uri):
        return [[file.path, *_file_identity(file.uri)] for file in files if file.path.endswith(SUFFIXES)]
    size = storage.file_size(uri)
    edges = storage.read_bytes(uri, 0, 1 << 20), storage.read_bytes(uri, max(0, size - (1 << 20)), size)
    return [size, *(fingerprint(edge.hex()) for edge in edges)]
