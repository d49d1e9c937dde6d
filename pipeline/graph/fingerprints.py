"""Fingerprints of the content at a URI, independent of location, time and folder name.

dataset, folder of datasets   fingerprints in the manifests
checkpoint, run               checksum of the weights
output of a transfer          scores
registered model              checkpoint of the version
other file or folder          names, sizes and bytes; above `MAX_READ` bytes names and sizes (on S3 also ETags)
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pipeline import config as configuration
from pipeline import storage
from pipeline.errors import StorageError, UserError
from pipeline.revision_names import manifest_uri, split_address
from pipeline.weights import checkpoints

MAX_READ = 256 << 20
"""Maximum size in bytes of a folder of raw files that is compared by content."""
THREADS = 32
MANIFEST, SCORES = "manifest.json", "scores.json"
NOT_A_PATH = re.compile(r"(timm|hf|demo):")
"""URIs of models of other libraries and of built-in data. They identify their content."""
_FINGERPRINT = re.compile(rb'"fingerprint": "([^"]*)"')


@dataclass(frozen=True, slots=True)
class Content:
    """The content at a URI. parts: {relative path: fingerprint} of the datasets in a folder."""

    fingerprint: str
    parts: dict[str, str] = field(default_factory=dict)

    def below(self, path: str) -> str:
        """The fingerprint of a relative path."""
        if not path:
            return self.fingerprint
        if path in self.parts:
            return self.parts[path]
        inside = {name: value for name, value in self.parts.items() if name.startswith(path + "/")}
        return configuration.fingerprint(inside) if inside else configuration.fingerprint([self.fingerprint, path])


class NotFound(UserError):
    """Raised when there is nothing at a URI."""


class Fingerprints:
    """Fingerprints of URIs outside the pipeline, each computed once.

    memory: earlier results by URI; files with unchanged sizes and times are not read again.
    """

    def __init__(self, memory: dict[str, Any] | None = None, tracking_uri: str | None = None) -> None:
        self.memory = memory if memory is not None else {}
        self.tracking_uri = tracking_uri
        self._seen: dict[str, str] = {}

    def fingerprint(self, text: str) -> str:
        """The fingerprint of the content at a URI. Raises NotFound if there is none."""
        if text not in self._seen:
            self._seen[text] = self._look(text)
        return self._seen[text]

    def _look(self, text: str) -> str:
        if NOT_A_PATH.match(text):
            return text
        if text.startswith(("models:/", "runs:/")):
            return self._registered(text)
        uri = storage.normalise(text)
        content = content_of(uri)
        if content is not None:
            return content.fingerprint
        return self._raw(uri)

    def _registered(self, text: str) -> str:
        from pipeline.tracking import registry  # MLflow takes seconds to import

        version = registry.version_at(text, self.tracking_uri)
        if version is None:
            if text.startswith("models:/"):
                raise NotFound(f"{text}: no such version of a registered model")
            return text
        try:
            return checkpoints.resolve(version.checkpoint).commit["files"]["model.safetensors"]["sha256"]
        except StorageError:
            raise
        except (UserError, KeyError):  # the checkpoint is on the disk of another machine
            return f"{version.name}/{version.version}"

    def _raw(self, uri: str) -> str:
        files = list(_files(uri))
        if not files:
            raise NotFound(f"{uri}: nothing is there")
        listing = configuration.fingerprint(sorted([path, size] for path, size, _ in files))
        stamps = configuration.fingerprint(sorted([path, size, stamp] for path, size, stamp in files))
        known = self.memory.get(uri)
        if isinstance(known, dict) and known.get("stamps") == stamps:
            return known["content"]
        if sum(size for _, size, _ in files) <= MAX_READ:
            content = _content(uri, [path for path, _, _ in files])
        else:  # on S3 the stamps are ETags, which follow the content
            content = stamps if storage.is_remote(uri) else listing
        self.memory[uri] = {"stamps": stamps, "content": content, "bytes": sum(size for _, size, _ in files)}
        return content

    def size(self, text: str) -> int:
        """Bytes at a URI outside the pipeline; 0 for models and built-in data."""
        if NOT_A_PATH.match(text) or text.startswith(("models:/", "runs:/")):
            return 0
        known = self.memory.get(storage.normalise(text), {}).get("bytes")
        return size(text) if known is None else known


def content_of(uri: str) -> Content | None:
    """The fingerprint of an output of one of the jobs; None for other content.

    Raises NotFound when there is nothing at the URI, and UserError for a damaged manifest or checkpoint.
    """
    here = set(storage.list_names(uri))
    if not here and (found := _revision(uri)) is not None:
        return Content(found)
    if not here:
        if storage.exists(uri) and not os.path.isdir(storage.normalise(uri)):  # a single file
            return None
        raise NotFound(f"{uri}: nothing is there")
    if MANIFEST in here:
        return Content(_dataset(uri))
    if checkpoints.COMMIT in here:
        return Content(_weights(checkpoints.read(uri)))
    if "checkpoints" in here:
        newest = checkpoints.latest(uri, checksums=False)
        return Content(_weights(newest)) if newest else None
    if SCORES in here:
        scores = storage.read_record(storage.join(uri, SCORES), ["scores"], "run the transfer again")["scores"]
        try:
            return Content(configuration.fingerprint({name: score.get("values") for name, score in scores.items()}))
        except (AttributeError, TypeError) as error:
            raise UserError(f"{storage.join(uri, SCORES)}: not the scores of a transfer run ({error})") from error
    parts = dict(_datasets_below(uri, sorted(here)))
    return Content(configuration.fingerprint(parts), parts) if parts else None


def _datasets_below(uri: str, names: list[str]) -> Iterator[tuple[str, str]]:
    """(path, fingerprint) of datasets one or two levels below a folder, such as splits, or tasks and splits of VTAB."""

    def look(name: str) -> list[tuple[str, str]]:
        below = storage.list_names(storage.join(uri, name))
        if MANIFEST in below:
            return [(name, _dataset(storage.join(uri, name)))]
        deeper = [f"{name}/{inner}" for inner in below if "." not in inner]
        return [
            (path, _dataset(storage.join(uri, path)))
            for path in deeper
            if storage.exists(storage.join(uri, path, MANIFEST))
        ]

    folders = [name for name in names if "." not in name and not name.startswith("_")][:64]
    if not storage.is_remote(uri):
        folders = [name for name in folders if os.path.isdir(storage.join(uri, name))]
        for name in folders:
            yield from look(name)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(look, folders):
            yield from found


def _dataset(uri: str) -> str:
    """The fingerprint in a manifest. It is near the beginning, so a manifest of hundreds of MB is not read in full."""
    place = uri if uri.endswith(".json") else storage.join(uri, MANIFEST)
    match = _FINGERPRINT.search(storage.read_bytes(place, 0, 1 << 16))
    if match is None:
        match = _FINGERPRINT.search(storage.read_bytes(place))
    if match is None:
        raise UserError(f"{place}: no fingerprint found; verify the dataset with `jobs/prepare.py verify {uri}`")
    return match[1].decode()


def _revision(uri: str) -> str | None:
    """The fingerprint of FOLDER@2; None when there is no such revision."""
    number, where = split_address(uri)[1], manifest_uri(uri)
    if number is None or not storage.exists(where):
        return None
    return _dataset(where) if b'"revision": %d,' % number in storage.read_bytes(where, 0, 1 << 16) else None


def _weights(checkpoint: checkpoints.Checkpoint) -> str:
    files = checkpoint.commit["files"]
    return files.get("model.safetensors", {}).get("sha256") or configuration.fingerprint(files)


# ---------------------------------------------------------------- raw files


def _files(uri: str) -> Iterator[tuple[str, int, str]]:
    """(path, bytes, stamp) of every file under a URI. The stamp changes with every write."""
    files = storage.list_files(uri)
    if not files and not os.path.isdir(uri):  # a single file
        with contextlib.suppress(FileNotFoundError):
            files = [storage.file_info(uri)]
    for file in files:
        yield file.path, file.size, file.stamp


def _content(uri: str, paths: list[str]) -> str:
    def digest(path: str) -> list[str]:
        place = storage.join(uri, path) if path else uri
        return [path, hashlib.sha256(storage.read_bytes(place)).hexdigest()]

    with ThreadPoolExecutor(THREADS if storage.is_remote(uri) else 1) as pool:
        return configuration.fingerprint(sorted(pool.map(digest, paths)))


def complete(uri: str, markers: tuple[str, ...]) -> str | None:
    """The path of the file that marks an output as complete, or None. `*` matches one name."""
    for marker in markers:
        if found := _find(uri, marker):
            return found
    return None


def _find(uri: str, marker: str) -> str | None:
    """The last path, in order of names, that matches a marker."""
    before, star, after = marker.partition("*")
    if not star:
        return marker if storage.exists(storage.join(uri, marker)) else None
    folder = storage.join(uri, before) if before else uri
    if not after:
        return next((before + name for name in reversed(storage.list_names(folder))), None)
    for name in reversed(storage.list_folders(folder)):
        if found := _find(storage.join(folder, name), after.strip("/")):
            return f"{before}{name}/{found}"
    return None


def size(uri: str) -> int:
    """Bytes of all files under a URI; 0 if there are none."""
    try:
        return sum(size for _, size, _ in _files(storage.normalise(uri)))
    except (OSError, UserError):
        return 0
