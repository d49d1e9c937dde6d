"""COMMIT.json, the file that makes a folder a committed checkpoint.

    write_commit(folder, {"step": 1000, "files": {"model.safetensors": {"size": 344, "sha256": "..."}}})
    commit = read_commit(folder)                       # raises Damaged
    check_content(uri, sha256, commit["files"]["model.safetensors"]["sha256"])

It is written last and holds the step, the size and SHA-256 of every other file, and a checksum of itself: a changed
bit in the step would otherwise make an unfinished run look finished.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import UserError

COMMIT = "COMMIT.json"
FORMAT = 4  # format version of checkpoints and run.json; a file without the field has version 1
CHECKSUM = "checksum"
"""Key of the SHA-256 of all other entries."""
STEP_FOLDER = re.compile(r"step-(\d{8,})(?:-[0-9a-f]{12})?")
"""The name of a checkpoint's folder; attempts after the first add their id."""


class Damaged(UserError):
    """A file of a checkpoint is not what was written."""


class OtherFormat(UserError):
    """Raised for a checkpoint of another format version. It is not damaged, so it is neither skipped nor removed."""


def write_commit(folder: str, commit: Mapping[str, Any]) -> dict[str, Any]:
    """Writes COMMIT.json with its format and checksum. Returns its content.

    commit: step, files {path: {size, sha256}}, and any other JSON-serialisable values.
    """
    content = json.loads(json.dumps({"format": FORMAT, **commit}))  # as it is read back
    content[CHECKSUM] = _checksum(content)
    storage.write_json(storage.join(folder, COMMIT), content)
    return content


def read_commit(folder: str) -> dict[str, Any]:
    """The content of a folder's COMMIT.json.

    Raises FileNotFoundError without one, OtherFormat for another version, and Damaged if it is not what was written or
    has another step than the folder's name.
    """
    commit = storage.read_json(storage.join(folder, COMMIT))
    try:
        step = int(commit["step"])
        for info in commit["files"].values():
            int(info["size"]), str(info["sha256"])
        checksum = _checksum(commit)
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise Damaged(f"{folder}: its {COMMIT} is invalid ({type(error).__name__}: {error})") from error
    if commit.get("format", 1) != FORMAT:
        raise OtherFormat(
            f"{folder}: its format version is {commit.get('format', 1)}, but this program reads {FORMAT}: use the version "
            "that wrote it"
        )
    if commit.get(CHECKSUM) != checksum:
        raise Damaged(f"{folder}: its {COMMIT} is damaged: it does not match its own checksum")
    if step_of(folder.rstrip("/").rpartition("/")[2]) not in (step, None):
        raise Damaged(f"{folder}: its {COMMIT} belongs to step {step}; was the folder renamed?")
    return commit


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None for another name."""
    match = STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def _checksum(commit: Mapping[str, Any]) -> str:
    content = {key: value for key, value in commit.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_content(uri: str, found: str, expected: str) -> None:
    """Raises Damaged if the SHA-256 of a file is not the one in COMMIT.json."""
    if found != expected:
        raise Damaged(
            f"{uri}: damaged: its content does not match the checkpoint's {COMMIT}; use another checkpoint, or copy "
            "this one again"
        )
