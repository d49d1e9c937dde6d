"""Loads weights into models, and models from checkpoints."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
from torch import nn

from models.weights import LoadReport, NamedWeights, Weights, load_tensors, translate
from pipeline import storage
from pipeline.errors import UserError
from pipeline.weights import description, folders
from pipeline.weights.files import read_file
from pipeline.weights.locate import locate


def load_weights(
    model: nn.Module, uri: str | os.PathLike, strict_head: bool = False, tracking_uri: str | None = None
) -> LoadReport:
    """Loads weights with any supported naming into a model, which keeps its image size and options. uri: .npz (Google's
    ViT, hybrid or BiT), .safetensors, a PyTorch file with a state dict, a folder (our checkpoint or run, a Hugging Face
    or timm model), local or s3://, or an MLflow URI. A head with other classes or another tanh layer is dropped, and
    the model keeps its head; with `strict_head` this is an error. Raises UserError that lists tensors that are missing,
    unknown or have another shape; the model is then unchanged.
    """
    place = locate(os.fspath(uri), tracking_uri)
    return load_tensors(model, _read(place), os.fspath(uri), strict_head)


def load_model(uri: str | os.PathLike, tracking_uri: str | None = None, **options: Any) -> nn.Module:
    """Creates the model of a checkpoint's config.json in eval mode, with its weights. `options` override the config."""
    place = locate(os.fspath(uri), tracking_uri)
    model = folders.build_model({**description.checkpoint_config(place)["model"], **options}, os.fspath(uri))
    load_tensors(model, _read(place), os.fspath(uri), strict_head=not options)
    return model.eval()


def open_model(uri: str, tracking_uri: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint in eval mode on the CPU, and its complete config.json. Of a masked patch prediction
    model, only the encoder is returned, without a head.
    """
    place = locate(uri, tracking_uri)
    config = description.checkpoint_config(place)
    encoder = {"mpp": None} if config["model"].get("mpp") else {}
    return load_model(place, **encoder), config


def read_weights(uri: str | os.PathLike) -> NamedWeights:
    """The tensors of a file or folder under this project's names, with the usage information of its config.json. Raises
    UserError for a file that is missing, damaged, incomplete or of an unknown type.
    """
    return _read(locate(os.fspath(uri)))


def save_checkpoint_weights(model_or_state: nn.Module | Weights, config: Mapping[str, Any], folder: str) -> None:
    """Writes model.safetensors and config.json, which `load_model` reads, to a local or s3:// folder.

    config: any JSON-serialisable values. The entry "model" is taken from the model by default, and is required with a
    state dict.
    """
    if isinstance(model_or_state, nn.Module):
        config = {"model": model_or_state.config, **config}
        model_or_state = model_or_state.state_dict()
    if "model" not in config:
        raise ValueError('a state dict does not describe its architecture; give config={"model": model.config}')
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model_or_state.items()}
    storage.write_bytes(storage.join(folder, "model.safetensors"), safetensors.torch.save(state, {"format": "pt"}))
    storage.write_bytes(storage.join(folder, "config.json"), (json.dumps(config, indent=1) + "\n").encode())


def _read(place: str) -> NamedWeights:
    home = description.folder_of(place)
    config = description.read_description(home)
    if place == home:
        tensors, notes = folders.read_folder(place)
    else:
        tensors, notes = read_file(place, description.recorded_checksums(home).get(place.rpartition("/")[2]))
    try:
        named = translate(tensors, config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return dataclasses.replace(named, notes=(*notes, *named.notes))
