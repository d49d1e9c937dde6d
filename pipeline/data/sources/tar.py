"""Tar archives: WebDataset samples, class folders in a tar, and ImageNet's tar with one inner tar per class.

Members are never extracted to disk, so their names cannot escape a folder.
"""

import bz2
import functools
import gzip
import itertools
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa

from pipeline import storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives, items
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.items import Item, ScanOptions, Source, too_large
from pipeline.data.sources.listing import IgnoredFiles
from pipeline.data.sources.samples import MAX_TABLE_BYTES, SampleScanner, Sidecar, items_of_sample, split_extension
from pipeline.errors import UserError
from pipeline.tarheaders import BoundedTarInfo

NAME = "tar"
SUFFIX = re.compile(r"\.(tar|tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # by first bytes
FIRST_MEMBERS = 64  # members that decide whether a tar has to be scanned
NUMBERING_MEMBERS = 8  # archives with the same first 8 member names number their samples independently
MAX_PADDING_BYTES = 16 << 20  # zeros between joined archives
DAMAGE = (
    tarfile.TarError,
    EOFError,
    OSError,
    zlib.error,
    lzma.LZMAError,
    pa.ArrowException,
)  # what reading a damaged archive raises


def matches(path: str) -> bool:
    return bool(SUFFIX.search(path))


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    return archives.scan_archives(NAME, uri, files, options, matches, scan_file)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    """Labels, folders and tables in a tar, and fragments that end between samples; in a tar of tars each inner tar is a
    fragment.

    If labels are not needed, the tar is read only if it is large enough to be divided, or if its first members lie in
    folders or are tars.
    """
    first = _first_members(uri)
    cut = size > 2 * options.unit_bytes and path.lower().endswith(".tar")
    if not (
        archives.names_wanted(options) or cut or any("/" in name or name.lower().endswith(".tar") for name in first)
    ):
        return FileScan(fragments=archives.whole_file(path, size), first_members=[first[:NUMBERING_MEMBERS]])
    found = _Scan(uri, path, size, options)
    try:
        with storage.open_file(uri) as file:
            found.read(file)
    except FileNotFoundError:
        raise
    except DAMAGE as error:  # the images before the damage are still read, and reading records the damage
        found.problem = f"{uri}: the archive is truncated: {error}"
    return found.result(first[:NUMBERING_MEMBERS])


class _Scan:
    """The state of scanning one tar."""

    def __init__(self, uri: str, path: str, size: int, options: ScanOptions) -> None:
        self.uri, self.path, self.size = uri, path, size
        self.unit_bytes = options.unit_bytes
        self.members = SampleScanner.new(options.columns, archives.member_filter(path, options), size, uri)
        self.cuts = [0]
        self.inner: list[tuple[str, int, int, int, list[str] | None]] = []  # fragments of inner archives
        self.inner_first: list[tuple[str, ...]] = []  # their first members
        self.only_inner = True
        self.problem = ""

    def read(self, file: IO[bytes]) -> None:
        packed = compression(file)
        for archive, member in _members(file, packed, ignored=self.members.ignored):
            if not member.isfile():
                continue
            if member.name.lower().endswith(".tar"):
                self.add_inner(member, packed)
                continue
            self.only_inner = False
            large = not packed and member.offset - self.cuts[-1] >= self.unit_bytes
            if self.members.starts_sample(member.name) and large:
                self.cuts.append(member.offset)
            self.members.add(member.name, member.size, functools.partial(_read_member, archive, member))

    def add_inner(self, member: tarfile.TarInfo, packed: str) -> None:
        label = os.path.basename(member.name)[:-4]
        self.members.names.add(label)
        if not packed:
            start = member.offset_data
            self.inner.append((self.path, member.size, start, start + member.size, [label]))
            self.inner_first.append(_first_members(self.uri, start, start + member.size)[:NUMBERING_MEMBERS])

    def result(self, first: tuple[str, ...]) -> FileScan:
        self.members.finish()
        if self.inner and self.only_inner:
            return self.members.scan(self.inner, self.inner_first, self.problem)
        ends = [*self.cuts[1:], -1]
        fragments: list[tuple[str, int, int, int, list[str] | None]] = [
            (self.path, (end if end > 0 else self.size) - start, start, end, None)
            for start, end in zip(self.cuts, ends, strict=True)
        ]
        return self.members.scan(fragments, [first], self.problem)


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes:
    handle = archive.extractfile(member)
    return handle.read(limit) if handle else b""


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(source, fragments, _read_fragment)


def _read_fragment(uri: str, name: str, fragment: dict[str, Any], source: Source) -> Iterator[Item]:
    start, scattered = fragment["start"], None
    try:
        if source.scattered:
            with storage.open_file(uri) as file:
                scattered = _scattered_sidecars(file, source)
        with storage.open_file(uri) as file:
            packed = compression(file)
            if start:
                file.seek(start)
            yield from _read_members(file, packed, fragment["stop"], name, fragment["labels"], source, scattered)
    except DAMAGE as error:
        yield Item(f"{name}@{start}", uri, b"", None, Refused("unreadable", f"the archive is truncated: {error}"))


def _scattered_sidecars(file: IO[bytes], source: Source) -> dict[str, Sidecar]:
    """The sidecars of an archive by stem, for samples whose members are not next to each other."""
    members = SampleScanner.new(source.columns, lambda name: True, MAX_TABLE_BYTES, "")
    try:
        for archive, member in _members(file, compression(file)):
            if member.isfile():
                members.starts_sample(member.name)
                members.add(member.name, member.size, functools.partial(_read_member, archive, member))
    except DAMAGE:
        pass  # reading the images reports the damage
    members.end_sample()
    return members.lone_sidecars


def _read_members(
    file: IO[bytes],
    packed: str,
    stop: int,
    name: str,
    labels: list[str] | None,
    source: Source,
    scattered: dict[str, Sidecar] | None = None,
    nested: bool = False,
) -> Iterator[Item]:
    """The items of WebDataset samples: neighbouring members with the same stem, such as an image and its label.

    A sample is held in memory, so its members together are limited to MAX_FILE_BYTES. nested: whether this archive is a
    member of another archive.
    """
    parts: dict[str, tuple[str, bytes]] = {}
    current = ""
    for archive, member in _members(file, packed, stop):
        if not member.isfile():
            detail = f"to {member.linkname}: pack what it points to (tar --dereference --hard-dereference)"
            yield Item(member.name, f"{name}/{member.name}", b"", None, Refused("link", detail))
            continue
        stem, extension = split_extension(member.name)
        if parts and (stem != current or extension in parts):
            yield from items_of_sample(parts, name, labels, source, scattered)
            parts = {}
        current = stem
        handle = archive.extractfile(member)
        if extension == "tar" and not nested and handle:
            inner = [os.path.basename(stem)]
            yield from _read_members(handle, "", -1, name, inner, source, nested=True)
            continue
        held = sum(len(data) for _, data in parts.values())
        if held + member.size > items.MAX_FILE_BYTES:
            yield Item(member.name, f"{name}/{member.name}", b"", None, too_large(held + member.size))
            continue
        parts[extension] = (member.name, handle.read() if handle else b"")
        del handle
    if parts:
        yield from items_of_sample(parts, name, labels, source, scattered)


# ---------------------------------------------------------------- members


def _members(
    file: IO[bytes], packed: str, stop: int = -1, ignored: IgnoredFiles | None = None
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Files and links from the current position to `stop`, in one tar or several concatenated ones (cat a.tar b.tar).
    ignored: counts hidden and system files.

    Raises tarfile.ReadError for a tar that ends early or has a damaged header; tarfile itself treats a damaged header
    as the end.
    """
    ignored = ignored or IgnoredFiles()
    unpacked: Any = _ForwardStream(_unpacked(file, packed)) if packed else file
    while True:
        # mode "r:" seeks past the data of members
        with tarfile.open(fileobj=unpacked, mode="r:", tarinfo=BoundedTarInfo) as archive:
            for member in archive:
                if 0 <= stop <= member.offset:
                    return
                member.name = member.name.removeprefix("./").replace("\\", "/")
                if (member.isfile() or member.islnk() or member.issym()) and not ignored.has(member.name):
                    yield archive, member
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
            end = archive.offset  # type: ignore[attr-defined]
        if not _at_next_archive(unpacked, end, stop):
            return


def _at_next_archive(file: Any, end: int, stop: int) -> bool:
    """Seeks to the next concatenated archive after byte `end`; returns False if there is
    none. Raises tarfile.ReadError for a damaged header."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {end:,}")
    position = end + len(block)
    while len(block) == tarfile.BLOCKSIZE and position - end < MAX_PADDING_BYTES and not 0 <= stop <= position:
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            try:
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return False  # padding after the end of an archive may contain anything
            file.seek(position)
            return True
        position += len(block)
    return False


def compression(file: IO[bytes]) -> str:
    """The compression of an open file by its first bytes, not its name; empty if the file is not compressed."""
    head = file.read(6)
    file.seek(0)
    return next((name for start, name in COMPRESSED.items() if head.startswith(start)), "")


def _unpacked(file: IO[bytes], packed: str) -> Any:
    """The decompressed contents of a file, including all of several concatenated streams."""
    openers: dict[str, Callable[[IO[bytes]], Any]] = {
        "gzip": lambda handle: gzip.GzipFile(fileobj=handle),
        "bzip2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
        "zstd": lambda handle: pa.CompressedInputStream(pa.PythonFile(handle, "r"), "zstd"),
    }
    return openers[packed](file)


class _ForwardStream:
    """A stream that can seek as far as tarfile needs: forward by reading, and back by at most one block."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.position, self.last = stream, 0, b""
        self.back = 0  # bytes of `last` that the next read returns again

    def tell(self) -> int:
        return self.position - self.back

    def read(self, size: int = -1) -> bytes:
        again = self.last[len(self.last) - self.back :] if self.back else b""
        again = again if size < 0 else again[:size]
        self.back -= len(again)
        parts = [again]
        missing = -1 if size < 0 else size - len(again)
        while missing:
            data = self.stream.read(missing)
            if not data:
                break
            self.position += len(data)
            missing -= len(data) if missing > 0 else 0
            self.last = (self.last + data)[-tarfile.BLOCKSIZE :]
            parts.append(data)
        return b"".join(parts)

    def seek(self, position: int, whence: int = 0) -> int:
        if position < self.tell():
            if self.position - position > len(self.last):
                raise tarfile.StreamError("seeking backwards is not allowed")
            self.back = self.position - position
        while self.tell() < position and self.read(min(1 << 20, position - self.tell())):
            pass
        return self.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _first_members(uri: str, start: int = 0, stop: int = -1) -> tuple[str, ...]:
    """The first member names of a tar between two byte offsets of a file. Archives that share their first NUMBERING_MEMBERS
    names number their samples independently of each other."""
    with storage.open_file(uri) as file:
        packed = compression(file)
        if not start and not packed and file.read(4) == b"PK\x03\x04":
            raise UserError(f"{uri}: a zip archive with the name of a tar archive; rename it to .zip")
        file.seek(start)
        try:
            return tuple(member.name for _, member in itertools.islice(_members(file, packed, stop), FIRST_MEMBERS))
        except DAMAGE as error:
            return (str(error), uri)  # damaged near its beginning: reading reports the damage
