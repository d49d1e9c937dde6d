"""Checks before a job starts that its output can be written.

check_output(storage.normalise(options.output))  # raises UserError; leaves no files
"""

import itertools
import os
import tempfile
import uuid
from collections.abc import Callable

from pipeline import storage
from pipeline.errors import Unavailable, UserError

PACKAGES = "/runtime_resources/working_dir_files/"
"""Part of every path in the copy of a working directory that `ray job submit` unpacks on a node."""


def refuse_other_files(uri: str, is_own: Callable[[str], bool]) -> None:
    """Raises UserError if a folder has files that are not of the job.

    is_own: whether a path relative to the folder is a file of the job."""
    others = (file.path for file in storage.iter_files(uri) if not is_own(file.path))
    some = sorted(itertools.islice(others, 2))  # the folder may be the root of a disk, so not all are listed
    if some:
        raise UserError(
            f"{uri}: already contains other files ({some[0]}{', ...' if len(some) > 1 else ''}); choose another "
            "--output or empty it"
        )


LONGEST_NAME = 255
"""Bytes of a file name, on every usual file system."""


def refuse_package_folder(uri: str, flag: str = "output") -> None:
    """Raises UserError if a Ray job would write to the temporary copy of its working directory, which Ray deletes."""
    if PACKAGES in storage.normalise(uri) + "/":
        raise UserError(
            f"{_shown(flag)} {storage.normalise(uri)} is in Ray's temporary copy of this folder, which is removed after the "
            "job; give an absolute path that the nodes share, or an s3:// address"
        )


def _shown(flag: str) -> str:
    return flag if flag.isupper() else f"--{flag}"


def check_output(uri: str, flag: str = "output") -> None:
    """Raises UserError, which names the flag, for an output folder that would be lost or cannot be written: in Ray's
    package folder, below a file, read-only, owned by another user, or in a missing or inaccessible bucket.

    flag: a flag without --, or an environment variable."""
    output, name = storage.normalise(uri), _shown(flag)
    refuse_package_folder(output, flag)
    if storage.is_remote(output):
        probe = storage.join(output, f".probe-{uuid.uuid4().hex[:12]}")
        try:
            storage.write_bytes(probe, b"")
            storage.remove(probe)
        except (UserError, OSError) as error:
            kind = Unavailable if isinstance(error, Unavailable) else UserError
            raise kind(f"{name} {output} cannot be written: {error}") from error
        return
    if any("\0" in part or len(os.fsencode(part)) > LONGEST_NAME for part in output.split("/")):
        raise UserError(f"{name} {output!r:.200}: no folder can have this name; choose another {name}")
    folder = output
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{name} {output}: {folder} is not a folder; choose another {name}")
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"probe")
    except OSError as error:
        raise UserError(
            f"{name} {output}: {folder} cannot be written ({error.strerror}); make it writable or choose another {name}"
        ) from error
