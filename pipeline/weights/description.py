"""Metadata in the folder of weights: config.json, and the checksums of COMMIT.json. Does not import torch."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.commit import check_content
from pipeline.errors import UserError
from pipeline.weights import checkpoints

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Suffixes of weights files."""


def recorded_checksums(uri: str) -> dict[str, str]:
    """{path: SHA-256} of the files of a checkpoint folder; empty without a COMMIT.json."""
    if not storage.exists(storage.join(uri, checkpoints.COMMIT)):
        return {}
    commit = checkpoints.read(uri)
    return {path: str(info["sha256"]) for path, info in commit.commit["files"].items()}


def read_description(uri: str) -> dict[str, Any]:
    """config.json of a folder, verified if a COMMIT.json has its checksum; empty if the file is missing."""
    path = storage.join(uri, "config.json")
    if not storage.exists(path):
        return {}
    data = storage.read_bytes(path)
    if expected := recorded_checksums(uri).get("config.json"):
        check_content(path, hashlib.sha256(data).hexdigest(), expected)
    try:
        return dict(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def model_options(uri: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The model options in a config.json. Raises UserError if there are none."""
    options = config.get("model")
    if not isinstance(options, dict):
        raise UserError(
            f"{uri}: no config.json with a model, so the architecture is unknown; create the model and load the file "
            "with load_weights"
        )
    if not isinstance(options.get("variant"), str):
        raise UserError(f"{uri}: config.json describes no model (the variant is missing)")
    return options


def folder_of(place: str) -> str:
    """The folder of a weights file; a folder itself."""
    is_file = place.lower().endswith(SUFFIXES)
    is_file = is_file and not (storage.can_list(place) and storage.list_files(place, recursive=False))
    return place.rpartition("/")[0] if is_file else place


def checkpoint_config(place: str) -> dict[str, Any]:
    """config.json of a checkpoint folder of this project, or of a weights file in
    it. Raises UserError if it is missing."""
    config = read_description(folder_of(place))
    model_options(place, config)
    return config
