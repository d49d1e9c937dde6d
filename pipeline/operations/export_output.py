"""The output folder of an export: written by one process at a time, and complete or marked as incomplete.

with claim(output):
    ...
    publish(scratch, output)
"""

import contextlib
import os
from collections.abc import Iterator

from pipeline import storage
from pipeline.errors import UserError, shorten
from pipeline.lease import LAUNCH, Lease

INCOMPLETE = "incomplete.json"
"""Lists the files of an export that is being written, or was interrupted; removed at the end."""


def check_unused(output: str) -> None:
    """Raises UserError if the output has other files than those of an interrupted export, which is repeated."""
    own = {LAUNCH, INCOMPLETE, *_unfinished(output)}
    if others := [file.path for file in storage.list_files(output) if file.path not in own]:
        raise UserError(f"{output}: already has files ({shorten(others, 3)}); give a new folder")


def _unfinished(output: str) -> list[str]:
    marker = storage.join(output, INCOMPLETE)
    if not storage.exists(marker):
        return []
    return [str(name) for name in storage.read_record(marker, ["files"])["files"]]


@contextlib.contextmanager
def claim(output: str) -> Iterator[None]:
    """Locks the output. Raises InUse while another process exports there. Leaves no empty folder."""
    try:
        with Lease(output, "export", doing="being written", remedy="choose another --output"):
            check_unused(output)
            yield
    finally:
        if not storage.is_remote(output):
            with contextlib.suppress(OSError):  # it has files
                os.rmdir(output)


def publish(folder: str, output: str) -> None:
    """Copies the files of an export to its output, config.json last. If a copy fails, nothing remains; if this process is
    killed, the file INCOMPLETE says so, and the same command replaces everything."""
    marker, left = storage.join(output, INCOMPLETE), _unfinished(output)
    names = sorted((file.path for file in storage.list_files(folder)), key=lambda name: name == "config.json")
    try:
        storage.write_json(marker, {"files": sorted({*left, *names})})
        for name in set(left) - set(names):
            storage.remove(storage.join(output, name))
        for name in names:
            storage.copy_file(storage.join(folder, name), storage.join(output, name))
    except BaseException:
        with contextlib.suppress(UserError, OSError):  # else INCOMPLETE remains
            for name in names:
                storage.remove(storage.join(output, name))
            storage.remove(marker)
        raise
    storage.remove(marker)
