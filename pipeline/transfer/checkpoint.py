"""Loads the model of --checkpoint as arrays that processes can share."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from models import create_model
from pipeline import storage
from pipeline.config import fingerprint
from pipeline.data import open_dataset
from pipeline.errors import UserError
from pipeline.revision_names import manifest_uri
from pipeline.tracking import artifacts, registry
from pipeline.tracking.names import RANDOM
from pipeline.transfer.backbones import LIBRARIES, open_backbone
from pipeline.transfer.imported import imported_model
from pipeline.transfer.suites import TransferConfig
from pipeline.weights import checkpoints, load_model, read_config
from pipeline.weights.description import SUFFIXES

MAX_NAMES_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class PretrainedModel:
    """A pre-trained model, ready to be shared between processes (`backbones.build_model`)."""

    uri: str
    identity: str
    """Fingerprint of the weights, from all or part of their content."""
    config: dict[str, Any]
    """Options of the model, including `variant` and `image_size`."""
    arrays: dict[str, np.ndarray]
    run_id: str | None = None
    """MLflow run of the pre-training."""
    images_seen: int | None = None
    """Number of images that the weights were trained on, if the checkpoint states it."""
    classes: tuple[str, ...] = ()
    """Names of the classes of the model's head, if known."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of the pre-training (plain `PretrainConfig`), if known."""

    @property
    def about(self) -> dict[str, Any]:
        """The model configuration for `suites.build_tasks`, with the classes and the pre-training."""
        return {**self.config, "classes": self.classes, "pretrain": self.training}


def load_checkpoint(config: TransferConfig) -> PretrainedModel:
    """Loads and checks the weights of --checkpoint. Raises UserError if they are missing, incomplete or do not fit."""
    loaded = _load(config)
    return replace(loaded, classes=read_class_names(config.class_names)) if config.class_names else loaded


def read_class_names(uri: str) -> tuple[str, ...]:
    """The class names of a prepared dataset, or the lines of a text file. Raises UserError if there are none."""
    uri = storage.normalise(uri)
    if storage.exists(manifest_uri(uri)):
        return tuple(open_dataset(uri).classes)
    try:
        data = storage.read_bytes(uri, 0, MAX_NAMES_BYTES + 1)
        if len(data) > MAX_NAMES_BYTES:
            raise UserError(
                f"--class-names {uri}: more than {MAX_NAMES_BYTES:,} bytes; give a text file with one name a line"
            )
        lines = data.decode().splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {uri}: neither a text file nor a prepared dataset") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"--class-names {uri} is empty")
    return tuple(line.strip() for line in lines if line.strip())


def _load(config: TransferConfig) -> PretrainedModel:
    uri = config.checkpoint or ("runs/demo/pretrain" if config.suite == "demo" else None)
    if uri is None:
        raise UserError(
            f"suite {config.suite} needs --checkpoint: a checkpoint or run folder, timm:NAME, hf:FOLDER, or weights with "
            "--variant"
        )
    if uri.startswith(RANDOM):
        return _random_encoder(_load(replace(config, checkpoint=uri.removeprefix(RANDOM))))
    if uri.startswith(LIBRARIES):
        if config.variant:
            raise UserError(f"--variant is for weights without a configuration; {uri} has one")
        model = open_backbone(uri)
        arrays = _arrays(model)
        return PretrainedModel(
            uri, fingerprint([model.config["variant"], _content(arrays)]), dict(model.config), arrays
        )
    run_id = images_seen = None
    if uri.startswith(artifacts.SCHEMES):
        place = artifacts.fetch(uri, config.tracking_uri)
        if registered := registry.version_at(uri, config.tracking_uri):
            uri, run_id = registered.checkpoint, registered.run_id or None
    else:
        uri = place = storage.normalise(uri)
    described: Mapping[str, Any] = {}
    if config.variant:
        model, labels = imported_model(config.variant, place)
        identity, described = _file_identity(place), {"classes": labels}
    elif place.endswith(SUFFIXES) or storage.exists(storage.join(place, "MLmodel")):
        described = read_config(place)  # raises UserError if there is no config.json next to the weights
        model, identity = load_model(place), _file_identity(place)
    else:
        found = checkpoints.resolve(place)
        uri = found.uri
        record = storage.join(uri.rpartition("/checkpoints/")[0] or uri, "run.json")  # run.json of pre-training
        run_id = recorded_run(record) if storage.exists(record) else None
        described = read_config(uri)
        masked = {"mpp": None} if described["model"].get("mpp") else {}  # transfer needs the encoder only
        model = load_model(uri, **masked)
        identity = found.commit["files"]["model.safetensors"]["sha256"]
        images_seen = found.commit.get("images_seen")
    return PretrainedModel(
        uri,
        fingerprint(identity),
        dict(model.config),
        _arrays(model),
        run_id,
        images_seen,
        tuple(described.get("classes") or ()),
        described.get("pretrain") or {},
    )


def _random_encoder(trained: PretrainedModel) -> PretrainedModel:
    """The same architecture with newly initialised weights. Raises UserError for a model of another library."""
    if "library" in trained.config:
        raise UserError(f"{RANDOM}{trained.uri}: only models of this project can have random weights")
    torch.manual_seed(0)
    arrays = _arrays(create_model(**trained.config))
    uri, identity = f"{RANDOM}{trained.uri}", fingerprint([RANDOM, trained.config])
    return replace(trained, uri=uri, identity=identity, arrays=arrays, run_id=None, images_seen=None)


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


def _file_identity(uri: str) -> list[Any]:
    """The size, first and last bytes of a weights file, or of all weights files in
    a folder, to avoid reading gigabytes."""
    if files := storage.list_files(uri):
        return [[file.path, *_file_identity(file.uri)] for file in files if file.path.endswith(SUFFIXES)]
    size = storage.file_size(uri)
    edges = storage.read_bytes(uri, 0, 1 << 20), storage.read_bytes(uri, max(0, size - (1 << 20)), size)
    return [size, *(fingerprint(edge.hex()) for edge in edges)]
