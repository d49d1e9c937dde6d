"""Builders of run folders, checkpoints and configs for all tests."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import logs, storage
from pipeline.commit import write_commit
from pipeline.training.config import PretrainConfig, RuntimeConfig
from pipeline.weights import checkpoints


def commit_checkpoint(folder: str | os.PathLike, step: int, **about: Any) -> str:
    """Writes COMMIT.json for the files of a folder, with their true sizes and checksums; the folder."""
    files = {
        file.path: {"size": file.size, "sha256": checkpoints.sha256(file.uri)}
        for file in storage.list_files(folder)
        if file.path != checkpoints.COMMIT
    }
    write_commit(os.fspath(folder), {"step": step, "metrics": {}, **about, "files": files})
    return str(folder)


def flip_bit(path: str | os.PathLike, position: int = -1) -> None:
    """Flips one bit of a file, by default in its last byte."""
    content = bytearray(Path(path).read_bytes())
    content[position] ^= 1
    Path(path).write_bytes(content)


RUNTIME = {field.name for field in dataclasses.fields(RuntimeConfig)}


def changed(config: PretrainConfig, **fields: Any) -> PretrainConfig:
    """A copy with other fields, those of `runtime` too: changed(config, lanes=4, output="there")."""
    runtime = {name: value for name, value in fields.items() if name in RUNTIME}
    others = {name: value for name, value in fields.items() if name not in RUNTIME}
    return replace(config, runtime=replace(config.runtime, **runtime), **others)


def pretrain_config(**fields: Any) -> PretrainConfig:
    return changed(PretrainConfig(), **fields)


@contextlib.contextmanager
def lines_of_log() -> Iterator[list[str]]:
    """Yields a list that has the log messages of the block at its end; those of warnings start with "warning: "."""
    lines: list[str] = []
    with logs.captured() as records:
        try:
            yield lines
        finally:
            for record in records:
                lines.append(("warning: " if record.levelname == "WARNING" else "") + record.getMessage())
