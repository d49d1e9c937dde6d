"""The original archives: which files a task needs, where they are, whether they are the right ones, and what is in them.

Files lie under RAW/<data set>/ (TFDS's name or the task's, e.g. RAW/oxford_iiit_pet/images.tar.gz or RAW/pets/images.tar.gz) or
directly under RAW, which is a local folder or s3:// prefix. An archive may also lie there unpacked. Nothing is ever extracted: members are read in memory.
"""

import contextlib
import errno
import fnmatch
import gzip
import hashlib
import http.client
import json
import os
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import IO, Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.vtab import tasks

MINIATURE = "MINIATURE.json"  # marks a folder of made-up archives and takes the place of the official checksums
MAX_MEMBER_BYTES = 1 << 30
CHUNK = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A file that a data set is read from. `unpacked` is what may lie there in its stead (a folder, or the same data in
    another container); `by_hand` says how to get it when no URL can be fetched without an account."""

    name: str
    bytes: int | None = None
    sha256: str | None = None
    url: str | None = None
    by_hand: str | None = None
    unpacked: str | None = None


@cache
def official() -> dict[str, list[File]]:
    """{data set: files}: names, sizes and SHA-256 as TFDS recorded them from the owners' servers."""
    table = json.loads(resources.files(__package__).joinpath("archives.json").read_text())
    return {dataset: [File(unpacked=row.pop("or", None), **row) for row in rows] for dataset, rows in table.items()}


def requirements(task: str) -> list[File]:
    """The files that `task` is made from."""
    return official()[tasks.get(task).dataset]


def describe(file: File) -> str:
    """One line for people: name, size, SHA-256 and where it comes from."""
    size = f"{file.bytes:,} bytes, " if file.bytes else ""
    checksum = f"sha256 {file.sha256}, " if file.sha256 else ""
    return f"{file.name}: {size}{checksum}from {file.url or file.by_hand}"


# ---------------------------------------------------------------- locating


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Where a required file lies. `prefix` is what its members' names begin with when it lies there unpacked."""

    file: File
    uri: str
    prefix: str = ""
    packed: bool = True


def locate(raw: str, dataset: str) -> tuple[list[Found], list[File]]:
    """What there is and what is missing of a data set's files."""
    names = [dataset, *(task.name for task in tasks.TABLE.values() if task.dataset == dataset)]
    own = [storage.join(raw, name) for name in dict.fromkeys(names)]
    found, missing = [], []
    for file in official()[dataset]:
        places = (_look(folder, file) for folder in (*own, raw))
        # RAW/dtd is the folder that DTD's archive belongs in, not the archive unpacked
        place = next((place for place in places if place and not (place.prefix and place.uri in own)), None)
        if place is None:
            missing.append(file)
        else:
            found.append(place)
    return found, missing


def _look(folder: str, file: File) -> Found | None:
    uri = storage.join(folder, file.name)
    if storage.exists(uri):
        return Found(file=file, uri=uri, prefix="" if file.bytes else file.name, packed=bool(file.bytes))
    if not file.unpacked:
        return None
    if "*" in file.unpacked:
        names = [info.path for info in storage.list_files(folder, recursive=False)]
        return Found(file=file, uri=folder, packed=False) if fnmatch.filter(names, file.unpacked) else None
    uri = storage.join(folder, file.unpacked)
    return Found(file=file, uri=uri, prefix=file.unpacked, packed=False) if storage.exists(uri) else None


# ---------------------------------------------------------------- verifying


def is_miniature(raw: str) -> bool:
    return storage.exists(storage.join(raw, MINIATURE))


def verify(raw: str, dataset: str, found: Iterable[Found]) -> None:
    """Compares size and SHA-256 of every packed file with the owners'.

    Raises UserError naming the first file that is truncated or another than the owners distribute. Unpacked folders
    have no checksum: the counts of the pools are compared later.
    """
    expected = {file.name: (file.bytes, file.sha256) for file in official()[dataset]}
    owner = "the official file"
    if is_miniature(raw):
        table = storage.read_json(storage.join(raw, MINIATURE))["files"].get(dataset, {})
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in table.items()}
        owner = "the miniature"
    for place in found:
        size, digest = expected.get(place.file.name, (None, None)) if place.packed else (None, None)
        if digest is None:
            continue
        fs, path = storage.filesystem(place.uri)
        actual = fs.size(path)
        if actual != size:
            kind = "truncated" if actual < size else "another file"
            raise UserError(f"{place.uri}: {kind}: {actual:,} bytes, {owner} has {size:,}; fetch it again")
        with storage.open_file(place.uri) as file:
            state = hashlib.sha256()
            while chunk := file.read(CHUNK):
                state.update(chunk)
        if state.hexdigest() != digest:
            raise UserError(
                f"{place.uri}: damaged or another version: its SHA-256 differs from {owner}'s; fetch it again"
            )


# ---------------------------------------------------------------- downloading


def download(raw: str, dataset: str, file: File, say: Callable[[str], None] = print) -> None:
    """Fetches one file into RAW/<data set>/, resuming an interrupted download, and checks size and SHA-256.

    Raises UserError when the server refuses, the connection keeps failing, or the file is not the official one.
    """
    if storage.is_remote(raw):
        raise UserError(f"{raw}: downloads go to a local folder; name one with --raw")
    if file.url is None:
        raise UserError(f"{file.name} cannot be fetched by a program: {file.by_hand}")
    target = os.path.join(raw, dataset, file.name)
    partial = target + ".part"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    say(f"fetching {describe(file)}")
    for attempt in range(5):
        time.sleep(attempt)
        have = os.path.getsize(partial) if os.path.exists(partial) else 0
        if file.bytes and have >= file.bytes:
            break
        request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-", "User-Agent": "vit-pipeline"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                # a server without ranges answers 200 and starts from the first byte
                with open(partial, "ab" if response.status == 206 else "wb") as sink:
                    while chunk := response.read(CHUNK):
                        sink.write(chunk)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise UserError(f"{file.url}: the server answers {error}; fetch it by hand to {target}") from error
            if attempt == 4:
                raise UserError(f"{file.url}: {error}; run the command again to go on from byte {have:,}") from error
    with open(partial, "rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    if digest != file.sha256:
        size = os.path.getsize(partial)
        if file.bytes and size < file.bytes:
            raise UserError(f"{file.url}: only {size:,} of {file.bytes:,} bytes came; run the command again to go on")
        os.remove(partial)
        raise UserError(f"{file.url}: the server's file has SHA-256 {digest}, not the official {file.sha256}")
    os.replace(partial, target)


# ---------------------------------------------------------------- members


@contextlib.contextmanager
def damaged(uri: str) -> Iterator[None]:
    """Turns what the decompressors raise over damaged bytes into a UserError that names the archive."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError, OSError) as error:
        # zipfile seeks to where a damaged directory sends it; other errors of the system are not the archive's
        theirs = errno.EINVAL, errno.EISDIR
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno not in theirs:
            raise
        raise UserError(f"{uri}: truncated or damaged ({error}); fetch it again") from error  # RuntimeError: encrypted


@contextlib.contextmanager
def unzipped(uri: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed when its name ends in .gz."""
    with storage.open_file(uri) as file, damaged(uri):
        if uri.endswith(".gz"):
            with gzip.open(file) as stream:
                yield stream  # type: ignore[misc]
        else:
            yield file


def _litter(name: str) -> bool:
    """What macOS leaves in folders and archives: pictures by their names, but resource forks by their contents."""
    *folders, file = name.split("/")
    return "__MACOSX" in folders or file.startswith("._") or file == ".DS_Store"


class Tree:
    """The members of a folder, a zip, or a tar (compressed or not), under the names that they have in the archive."""

    def __init__(self, uri: str, prefix: str = "") -> None:
        self.uri, self.prefix = uri, prefix
        name = uri.lower()
        self.kind = (
            "zip" if name.endswith(".zip") else "tar" if name.endswith((".tar", ".tgz", ".tar.gz")) else "folder"
        )

    @property
    def random_access(self) -> bool:
        return self.kind != "tar"

    def names(self) -> list[str]:
        """All members in archive order (a folder: sorted)."""
        if self.kind == "folder":
            inside = f"{self.prefix}/" if self.prefix else ""
            return [inside + info.path for info in storage.list_files(self.uri) if not _litter(info.path)]
        if self.kind == "zip":
            with self._zip() as archive:
                return [i.filename for i in archive.infolist() if not i.is_dir() and not _litter(i.filename)]
        return [name for name, _ in self.walk()]

    def walk(self, keep: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, IO[bytes]]]:
        """(name, open file) of the members that `keep` wants, in archive order; a file is open until the next is taken."""
        if self.kind != "tar":
            for name in self.names():
                if keep(name):
                    with self._open(name) as member:
                        yield name, member
            return
        with damaged(self.uri), storage.open_file(self.uri) as file:
            # Two of the official "tar.gz" are plain tar files. tarfile's own decompression would take a gzip stream that is
            # cut short for the end of the archive; gzip does not.
            compressed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            with (
                gzip.open(file) if compressed else contextlib.nullcontext(file) as stream,
                tarfile.open(fileobj=stream, mode="r|") as archive,  # type: ignore[arg-type]
            ):
                for info in archive:
                    name = info.name.removeprefix("./")
                    if info.isfile() and not _litter(name) and keep(name):
                        yield name, archive.extractfile(info)  # type: ignore[misc]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of the members asked for, in the order asked for, or of the archive when that is a tar. Members that
        are not there are left out."""
        if self.kind == "tar":
            wanted = set(names)
            for name, member in self.walk(wanted.__contains__):
                yield name, _all(member, f"{self.uri}: {name}")
            return
        for name in names:
            with contextlib.suppress(KeyError, FileNotFoundError):
                with self._open(name) as member:
                    data = _all(member, f"{self.uri}: {name}")
                yield name, data

    def _zip(self) -> Any:
        # One open archive per Tree: the directory of CLEVR_v1.0.zip lists 100,000 members.
        if not hasattr(self, "_archive"):
            with damaged(self.uri):
                fs, path = storage.filesystem(self.uri)
                self._archive = zipfile.ZipFile(fs.open(path, "rb"))
        return contextlib.nullcontext(self._archive)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if self.kind == "zip":
            with self._zip() as archive, damaged(f"{self.uri}: {name}"), archive.open(name) as member:
                yield member
        else:
            inside = name[len(self.prefix) + 1 :] if self.prefix else name
            if inside.startswith("/") or ".." in inside.split("/"):  # from an annotation
                raise FileNotFoundError(f"{name} lies outside {self.uri}")
            with storage.open_file(storage.join(self.uri, inside)) as member:
                yield member


def _all(member: IO[bytes], where: str) -> bytes:
    with damaged(where):
        data = member.read(MAX_MEMBER_BYTES + 1)
    if len(data) > MAX_MEMBER_BYTES:
        raise UserError(f"{where}: more than {MAX_MEMBER_BYTES:,} bytes, which no file of this data set has")
    return data
