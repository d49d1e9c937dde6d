"""From what a user calls a checkpoint to a model: a folder, a run, an MLflow URI."""

from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.tracking.artifacts import fetch

if TYPE_CHECKING:
    from torch import nn


def locate(uri: str, tracking_uri: str | None = None) -> str:
    """The folder or file of weights that a URI means.

    MLflow URIs are downloaded, a run folder means its newest complete checkpoint. Raises UserError when there is none.
    """
    from pipeline.training import checkpoint

    uri = storage.normalise(fetch(uri, tracking_uri))
    run = not storage.exists(storage.join(uri, "config.json")) or storage.exists(storage.join(uri, "checkpoints"))
    if run and storage.list_files(storage.join(uri, "checkpoints")):
        return checkpoint.resolve(uri).uri
    return uri


def open_model(uri: str, tracking_uri: str | None = None) -> "tuple[nn.Module, dict[str, Any]]":
    """The model of a checkpoint in eval mode on the CPU, and its whole config.json.

    A model of masked patch prediction comes back as the plain encoder inside it, without a head.
    """
    from models.convert import load_model, read_config

    folder = locate(uri, tracking_uri)
    config = read_config(folder)
    encoder = {"mpp": None} if config["model"].get("mpp") else {}
    return load_model(folder, **encoder), config
