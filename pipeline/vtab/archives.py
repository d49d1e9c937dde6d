"""The files of a task: requirements, lookup, download and verification.

Files are in RAW/<data set>/ (the name in TFDS or the name of the task, e.g. RAW/oxford_iiit_pet/images.tar.gz or
RAW/pets/images.tar.gz) or directly in RAW, a local folder or s3:// prefix. Archives may also be unpacked there.
"""

import fnmatch
import hashlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterable

from pipeline import storage
from pipeline.errors import UserError
from pipeline.retry import retry
from pipeline.vtab import tasks
from pipeline.vtab.containers import open_nested
from pipeline.vtab.datasets import get_dataset
from pipeline.vtab.datasets.base import FoundFile, OfficialFile

logger = logging.getLogger(__name__)

MINIATURE = "MINIATURE.json"  # marks a folder of synthetic archives and replaces the official checksums
CHUNK = 4 << 20  # bytes
GO_ON = "repeat the command to continue"


def requirements(task: str) -> list[OfficialFile]:
    """The files of a task."""
    return list(get_dataset(tasks.get(task).dataset).files)


def describe_file(file: OfficialFile) -> str:
    """A description of a file in one line: name, size, SHA-256, source, and accepted alternatives."""
    size = f"{file.bytes:,} bytes, " if file.bytes else ""
    checksum = f"sha256 {file.sha256}, " if file.sha256 else ""
    others = [*(file.within or ())[:1], *file.instead]
    instead = f"; accepted instead: {', '.join(others)}" if others else ""
    return f"{file.name}: {size}{checksum}from {' or '.join(filter(None, [file.url, file.manual]))}{instead}"


# ---------------------------------------------------------------- locating


def locate(raw: str, dataset: str) -> tuple[list[FoundFile], list[OfficialFile]]:
    """The present and missing files of a data set."""
    names = [dataset, *(task.name for task in tasks.TABLE.values() if task.dataset == dataset)]
    own = [storage.join(raw, name) for name in dict.fromkeys(names)]
    found, missing = [], []
    for file in get_dataset(dataset).files:
        places = (_look(folder, file) for folder in (*own, raw))
        # RAW/dtd is the folder for DTD's archive, not the unpacked archive
        place = next((place for place in places if place and not (place.prefix and place.uri in own)), None)
        if place is None:
            missing.append(file)
        else:
            found.append(place)
    return found, missing


def _look(folder: str, file: OfficialFile) -> FoundFile | None:
    """The file in `folder`, under its name or an accepted alternative."""
    uri = storage.join(folder, file.name)
    if storage.exists(uri):
        return FoundFile(file=file, uri=uri, prefix="" if file.bytes else file.name, packed=bool(file.bytes))
    if file.within and storage.exists(storage.join(folder, file.within[0])):
        return FoundFile(file=file, uri=storage.join(folder, file.within[0]), nested=file.within[1])
    for name in file.instead:
        if "*" in name:
            names = [info.path for info in storage.list_files(folder, recursive=False)]
            if fnmatch.filter(names, name):
                return FoundFile(file=file, uri=folder, packed=False)
        elif storage.exists(storage.join(folder, name)):
            return FoundFile(file=file, uri=storage.join(folder, name), prefix=name, packed=False)
    return None


# ---------------------------------------------------------------- verifying


def is_miniature(raw: str) -> bool:
    return storage.exists(storage.join(raw, MINIATURE))


def verify(raw: str, dataset: str, found: Iterable[FoundFile]) -> None:
    """Compares size and SHA-256 of every packed file with the official ones.

    Raises UserError naming the first file that is truncated or not the official one. Unpacked folders have no checksum;
    their pool counts are compared later."""
    expected = {file.name: (file.bytes, file.sha256) for file in get_dataset(dataset).files}
    owner = "the official file"
    if is_miniature(raw):
        marker = storage.join(raw, MINIATURE)
        try:
            table = storage.read_record(marker, ["files"])["files"].get(dataset, {})
            expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in table.items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{marker}: not a valid list of miniature files ({error}); remove it") from error
        owner = "the miniature"
    for place in found:
        size, digest = expected.get(place.file.name, (None, None)) if place.packed else (None, None)
        if size is None or digest is None:
            continue
        where = f"{place.uri}: {place.nested}" if place.nested else place.uri
        with open_nested(place.uri, place.nested) as file:
            actual = file.seek(0, os.SEEK_END) if not place.nested else size
            if actual != size:
                kind = "truncated" if actual < size else "another file"
                raise UserError(f"{where}: {kind}: {actual:,} bytes, {owner} has {size:,}; fetch it again")
            file.seek(0)
            state = hashlib.sha256()
            while chunk := file.read(CHUNK):
                state.update(chunk)
        if state.hexdigest() != digest:
            raise UserError(f"{where}: damaged or another version: its SHA-256 differs from {owner}'s; fetch it again")


# ---------------------------------------------------------------- downloading


def download(raw: str, dataset: str, file: OfficialFile) -> None:
    """Downloads one file to RAW/<data set>/, resuming an interrupted download, and checks size and SHA-256.

    Raises UserError when the server refuses, the connection keeps failing, or the file is not the official one.
    """
    if storage.is_remote(raw):
        raise UserError(f"{raw}: downloads go to a local folder; name one with --raw")
    if file.url is None:
        raise UserError(f"{file.name} has to be downloaded manually: {file.manual}")
    target = os.path.join(raw, dataset, file.name)
    partial = target + ".part"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    logger.info("fetching %s", describe_file(file))
    retry(file.url, lambda: _fetch_rest(file, partial), lambda error: _refused(file, target, error), GO_ON)
    with open(partial, "rb") as source:  # which this process wrote
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    if digest != file.sha256:
        size = os.path.getsize(partial)
        if file.bytes and size < file.bytes:
            raise UserError(f"{file.url}: only {size:,} of {file.bytes:,} bytes received; {GO_ON}")
        os.remove(partial)
        raise UserError(f"{file.url}: the server's file has SHA-256 {digest}, not the official {file.sha256}")
    os.replace(partial, target)


def _fetch_rest(file: OfficialFile, partial: str) -> None:
    """Downloads the rest of `partial`."""
    storage.refuse_special(partial)
    have = os.path.getsize(partial) if os.path.exists(partial) else 0
    if file.bytes and have >= file.bytes:
        return
    assert file.url is not None
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-", "User-Agent": "vit-pipeline"})
    with urllib.request.urlopen(request, timeout=60) as response:
        # a server without range support responds with 200 and sends the whole file
        with open(partial, "ab" if response.status == 206 else "wb") as sink:
            while chunk := response.read(CHUNK):
                sink.write(chunk)


def _refused(file: OfficialFile, target: str, error: Exception) -> Exception | None:
    """The error for a response that a retry would not change."""
    if isinstance(error, urllib.error.HTTPError) and error.code < 500:
        other = f" or get {file.manual}" if file.manual else ""
        return UserError(f"{file.url}: the server responded with {error}; download it manually to {target}{other}")
    return None if isinstance(error, (OSError, http.client.HTTPException)) else error
