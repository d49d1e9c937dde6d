"""Resolves a user's address of a checkpoint (folder, run or MLflow URI) to the folder or file of its weights."""

import os
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.tracking.artifacts import fetch
from pipeline.weights import checkpoints, description


def locate(uri: str, tracking_uri: str | None = None) -> str:
    """The folder or file of weights for a URI. MLflow URIs are downloaded. A run folder resolves to its newest complete
    checkpoint, and the folder of an MLflow model to the checkpoint among its artifacts. Raises UserError if there is
    none.
    """
    uri = storage.normalise(fetch(uri, tracking_uri))
    if not storage.can_list(uri):  # a web server
        if not storage.exists(uri):
            raise UserError(f"{uri}: no such file; name the file of the weights, since https:// has no folders")
        return uri
    is_run = not storage.exists(storage.join(uri, "config.json")) or storage.exists(storage.join(uri, "checkpoints"))
    if is_run and storage.list_files(storage.join(uri, "checkpoints")):
        return checkpoints.resolve(uri).uri
    if storage.exists(storage.join(uri, "MLmodel")):
        candidates = [file.uri for file in storage.list_files(uri) if file.path.endswith("/model.safetensors")]
        if len(candidates) == 1:
            return candidates[0].rpartition("/")[0]
    if not storage.exists(uri):
        raise UserError(f"{uri}: no such file or folder{storage.nearest_folder(uri)}")
    return uri


def read_config(uri: str | os.PathLike, tracking_uri: str | None = None) -> dict[str, Any]:
    """config.json of the checkpoint at a URI, with the model options under "model". Raises UserError if it is missing,
    or was not written by this project.
    """
    return description.checkpoint_config(locate(os.fspath(uri), tracking_uri))
