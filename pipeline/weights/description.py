"""What stands beside weights in their folder: config.json, and the checksums of COMMIT.json. Needs no torch."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.weights import checkpoints

SUFFIXES = (".safetensors", ".npz", ".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Of files of weights."""


def recorded_checksums(uri: str) -> dict[str, str]:
    """{path: SHA-256} of the files of a checkpoint folder; empty for a folder that no COMMIT.json describes."""
    if not storage.exists(storage.join(uri, checkpoints.COMMIT)):
        return {}
    commit = checkpoints.read_commit(uri)
    return {path: str(info["sha256"]) for path, info in commit.commit["files"].items()}


def read_description(uri: str) -> dict[str, Any]:
    """config.json of a folder, verified where a COMMIT.json records it; empty when there is none."""
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
    """The model's options in a config.json. Raises UserError when there are none."""
    options = config.get("model")
    if not isinstance(options, dict):
        raise UserError(
            f"{uri}: no config.json with a model in it, so the architecture is not known; "
            "name the variant and load the file with load_weights"
        )
    if not isinstance(options.get("variant"), str):
        raise UserError(f"{uri}: config.json describes no model (its model has no variant)")
    return options


def check_content(uri: str, found: str, expected: str) -> None:
    """Raises UserError when a file's checksum is not the one that COMMIT.json records."""
    if found != expected:
        raise UserError(
            f"{uri}: damaged: its content is not the one that the checkpoint's {checkpoints.COMMIT} records; use another "
            "checkpoint, or copy this one again"
        )


def folder_of(place: str) -> str:
    """The folder of a weights file; a folder itself."""
    is_file = place.lower().endswith(SUFFIXES) and not storage.list_files(place, recursive=False)
    return place.rpartition("/")[0] if is_file else place


def checkpoint_config(place: str) -> dict[str, Any]:
    """config.json of our checkpoint's folder, or of a weights file in it. Raises UserError when there is none."""
    config = read_description(folder_of(place))
    model_options(place, config)
    return config
