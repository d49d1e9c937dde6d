"""Builders of run folders and checkpoints for the tests of every room."""

import os
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.weights import checkpoints


def commit_checkpoint(folder: str | os.PathLike, step: int, **about: Any) -> str:
    """Writes COMMIT.json for the files of a folder, with their true sizes and checksums; the folder."""
    files = {
        file.path: {"size": file.size, "sha256": checkpoints.sha256(file.uri)}
        for file in storage.list_files(folder)
        if file.path != checkpoints.COMMIT
    }
    commit = {"format": checkpoints.FORMAT, "step": step, "metrics": {}, **about, "files": files}
    storage.write_json(storage.join(folder, checkpoints.COMMIT), commit)
    return str(folder)


def flip_bit(path: str | os.PathLike, position: int = -1) -> None:
    """Changes one bit of a file, its last byte's by default; its size stays."""
    content = bytearray(Path(path).read_bytes())
    content[position] ^= 1
    Path(path).write_bytes(content)
