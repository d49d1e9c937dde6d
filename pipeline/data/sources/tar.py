"""Tar archives: WebDataset samples, class folders in a tar, and ImageNet's tar of one tar a class.

Nothing is ever extracted to disk, so names of members are only names.
"""

import itertools
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, Self

import pyarrow as pa

from pipeline import storage
from pipeline.data import codecs
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives, items
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.items import Item, ScanOptions, Source, too_large
from pipeline.data.sources.layout import WORDNET
from pipeline.data.sources.listing import JUNK
from pipeline.data.sources.tables import CAPTION_COLUMNS, LABEL_COLUMNS, LabelTable, label_names

NAME = "tar"
SUFFIX = re.compile(r"\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz)$", re.IGNORECASE)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")  # first bytes of gzip, bzip2 and xz
SIDECARS = ("cls", "txt", "json")  # members that hold a sample's label, the first that has one
MAX_HEADER_BYTES = 1 << 20  # of a long name or of extended attributes; tarfile holds it in memory
EXTENSIONS = (  # kinds of headers that describe the next member
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)  # what reading a damaged archive raises


def matches(path: str) -> bool:
    return bool(SUFFIX.search(path))


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    return archives.scan_archives(NAME, uri, files, options, matches, scan_file)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    """Label names of a tar, and fragments that end between samples; a tar of tars is cut at its inner archives.

    A tar whose label names nobody needs is read only when it is large enough to be cut, or when it holds archives.
    """
    first = _first_members(uri)
    names_wanted = archives.names_wanted(options)
    cut = size > 2 * options.unit_bytes and path.lower().endswith(".tar")
    if not (names_wanted or cut or any(name.lower().endswith(".tar") for name in first)):
        return FileScan(fragments=archives.whole(path, size), first_members=[first])
    found = _Scan(uri, path, size, options.unit_bytes, names_wanted)
    try:
        with storage.open_file(uri) as file:
            found.read(file)
    except FileNotFoundError:
        raise
    except DAMAGE as error:  # still read as far as possible; reading it again records why it stops there
        found.end_sample()
        found.problem = f"{uri}: the archive breaks off: {error}"
    return found.result(first)


class _Scan:
    """The state of scanning one tar."""

    def __init__(self, uri: str, path: str, size: int, unit_bytes: int, names_wanted: bool) -> None:
        self.uri, self.path, self.size = uri, path, size
        self.unit_bytes, self.names_wanted = unit_bytes, names_wanted
        self.names: set[str] = set()
        self.cuts = [0]
        self.inner: list[tuple[str, int, int, int, list[str] | None]] = []  # fragments that are inner archives
        self.inner_first: list[tuple[str, ...]] = []  # their first members
        self.only_inner = True
        self.multilabel = False
        self.problem = ""
        self.sample = ""  # the stem of the current sample,
        self.sidecars: dict[str, list[str]] = {}  # its labels by sidecar,
        self.captioned = False  # whether its text is a caption,
        self.from_paths: list[list[str]] = []  # and those that the paths of its images give

    def read(self, file: IO[bytes]) -> None:
        packed = _is_compressed(file)
        for archive, member in _members(file, packed):
            if not member.isfile():
                continue
            if member.name.lower().endswith(".tar"):
                self.add_inner(member, packed)
                continue
            self.only_inner = False
            stem, extension = _split_name(member.name)
            if stem != self.sample:
                self.end_sample()
                if member.offset - self.cuts[-1] >= self.unit_bytes and not packed:
                    self.cuts.append(member.offset)
            self.sample = stem
            if self.names_wanted and extension in SIDECARS:
                handle = archive.extractfile(member)
                data = handle.read(1 << 20) if handle else b""
                self.captioned |= extension == "json" and _has_caption(data)
                found, many = _sidecar(extension, data)
                self.multilabel |= many
                if found is not None:
                    self.sidecars[extension] = found
            elif _is_image(extension):
                self.from_paths.append(_path_label(member.name) or [])
        self.end_sample()

    def add_inner(self, member: tarfile.TarInfo, packed: bool) -> None:
        label = os.path.basename(member.name)[:-4]
        self.names.add(label)
        if not packed:
            start = member.offset_data
            self.inner.append((self.path, member.size, start, start + member.size, [label]))
            self.inner_first.append(_first_members(self.uri, start))

    def end_sample(self) -> None:
        if self.captioned:
            self.sidecars.pop("txt", None)
        self.captioned = False
        own = next((self.sidecars[extension] for extension in SIDECARS if extension in self.sidecars), None)
        for label in self.from_paths[:1] if own is None else [own] if self.from_paths else []:
            self.names.update(label)
        self.sidecars.clear()
        self.from_paths.clear()

    def result(self, first: tuple[str, ...]) -> FileScan:
        names = sorted(self.names)
        if self.inner and self.only_inner:
            return FileScan(fragments=self.inner, names=names, first_members=self.inner_first, problem=self.problem)
        ends = [*self.cuts[1:], -1]
        fragments: list[tuple[str, int, int, int, list[str] | None]] = [
            (self.path, (end if end > 0 else self.size) - start, start, end, None)
            for start, end in zip(self.cuts, ends, strict=True)
        ]
        return FileScan(
            fragments=fragments, names=names, multilabel=self.multilabel, first_members=[first], problem=self.problem
        )


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(source, fragments, _read_fragment)


def _read_fragment(uri: str, name: str, fragment: dict[str, Any], source: Source) -> Iterator[Item]:
    start = fragment["start"]
    try:
        with storage.open_file(uri) as file:
            packed = _is_compressed(file)
            if start:
                file.seek(start)
            yield from _read_members(file, packed, fragment["stop"], name, fragment["labels"], source.table)
    except DAMAGE as error:
        yield Item(f"{name}@{start}", uri, b"", None, Refused("unreadable", f"the archive breaks off: {error}"))


def _read_members(
    file: IO[bytes],
    stream: bool,
    stop: int,
    name: str,
    labels: list[str] | None,
    table: LabelTable,
    nested: bool = False,
) -> Iterator[Item]:
    """Samples: neighbouring members that share a stem (WebDataset), with one image and perhaps a label beside it.

    A sample is held in memory, so its members together are limited to MAX_FILE_BYTES. nested: this archive is a member itself.
    """
    parts: dict[str, tuple[str, bytes]] = {}
    current = ""
    for archive, member in _members(file, stream, stop):
        if not member.isfile():
            detail = f"to {member.linkname}: pack what it points to (tar --dereference --hard-dereference)"
            yield Item(member.name, f"{name}/{member.name}", b"", None, Refused("link", detail))
            continue
        stem, extension = _split_name(member.name)
        if parts and (stem != current or extension in parts):
            yield from _items_of_sample(parts, name, labels, table)
            parts = {}
        current = stem
        handle = archive.extractfile(member)
        if extension == "tar" and not nested and handle:
            yield from _read_members(handle, True, -1, name, [os.path.basename(stem)], table, nested=True)
            continue
        held = sum(len(data) for _, data in parts.values())
        if held + member.size > items.MAX_FILE_BYTES:
            yield Item(member.name, f"{name}/{member.name}", b"", None, too_large(held + member.size))
            continue
        parts[extension] = (member.name, handle.read() if handle else b"")
        del handle
    if parts:
        yield from _items_of_sample(parts, name, labels, table)


def _items_of_sample(
    parts: dict[str, tuple[str, bytes]], name: str, labels: list[str] | None, table: LabelTable
) -> Iterator[Item]:
    """The items of one sample, {extension: (member, data)}.

    Images that share a stem without a label beside them (a.1.jpg and a.2.jpg, a.jpg and a.png) are inputs of their own.
    """
    rest = [extension for extension in parts if extension not in SIDECARS]
    captioned = "json" in parts and _has_caption(parts["json"][1])
    beside = (_sidecar(e, parts[e][1])[0] for e in SIDECARS if e in parts and not (captioned and e == "txt"))
    own = next((names for names in beside if names is not None), None)
    if not rest:
        member = next(iter(parts.values()))[0]
        yield Item(member, f"{name}/{member}", b"", own, Refused("not an image"))
        return
    pictures = [e for e in rest if e in codecs.extensions()] or [e for e in rest if _is_image(e)] or rest
    for extension in pictures[:1] if len(rest) < len(parts) else pictures:
        member, data = parts[extension]
        if table.labels:
            found = table.lookup(member)
        else:  # an empty list is a label too, of a sample that has none of the classes
            found = own if own is not None else labels or _path_label(member)
        yield Item(member, f"{name}/{member}", data, found, split=table.splits.get(table.find(member) or ""))


# ---------------------------------------------------------------- members


class _Header(tarfile.TarInfo):
    """A member's header; a long name or extended attributes of more than MAX_HEADER_BYTES end the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENSIONS and header.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def _members(file: IO[bytes], stream: bool, stop: int = -1) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Files and links from the current position to `stop`. A tar that ends early raises tarfile.ReadError."""
    # "r|" never seeks, for gzip; "r:" skips over data. Nothing is ever extracted to disk, so member names are only names.
    with tarfile.open(fileobj=file, mode="r|*" if stream else "r:", tarinfo=_Header) as archive:
        for member in archive:
            if 0 <= stop <= member.offset:
                return
            member.name = member.name.removeprefix("./")
            if (member.isfile() or member.islnk() or member.issym()) and not re.search(JUNK, member.name):
                yield archive, member
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen


def _path_label(path: str) -> list[str] | None:
    """The class that a path in an archive names: the WordNet id its file name begins with, else its last folder."""
    folders, _, base = path.rpartition("/")
    wordnet = WORDNET.match(base)
    if wordnet:
        return [wordnet[1]]
    return [folders.rpartition("/")[2]] if folders else None


def _first_members(uri: str, start: int = 0) -> tuple[str, ...]:
    """The first eight names in a tar that begins at byte `start`: two archives that agree in them number their samples
    each for itself, and are not two halves of one numbering with a duplicate."""
    with storage.open_file(uri) as file:
        packed = _is_compressed(file)
        file.seek(start)
        try:
            return tuple(member.name for _, member in itertools.islice(_members(file, packed), 8))
        except DAMAGE as error:
            return (str(error), uri)  # damaged in its first files: reading it will tell


def _is_compressed(file: IO[bytes]) -> bool:
    """Whether an open archive is compressed, whatever its name says."""
    head = file.read(6)
    file.seek(0)
    return head.startswith(COMPRESSED)


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def _is_image(extension: str) -> bool:
    """`extension` in WebDataset's sense: jpg, or seg.png."""
    return extension.rpartition(".")[2] in codecs.extensions()


def _has_caption(data: bytes) -> bool:
    """Whether a sample's JSON says that its text is a caption, as img2dataset's does: captions are no classes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(str(key).lower() in CAPTION_COLUMNS for key in value)


def _sidecar(extension: str, data: bytes) -> tuple[list[str] | None, bool]:
    """(label names, multi-label) of a .cls, .txt or .json member."""
    try:
        text = data.decode().strip()
        if extension != "json":
            return ([text] if text else None), False
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None, False
    if isinstance(value, dict):
        lower = {str(key).lower(): item for key, item in value.items()}
        value = next((lower[column] for column in LABEL_COLUMNS if column in lower), None)
    many = isinstance(value, list)
    return label_names(value, many), many
