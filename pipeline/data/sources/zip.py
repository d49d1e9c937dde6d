"""Zip archives of WebDataset samples or class folders. Members are read at random, so several workers can share an
archive.

Members are never extracted to disk, so their names cannot escape a folder.
"""

import functools
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives, items
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.items import Item, ScanOptions, Source, too_large
from pipeline.data.sources.listing import IgnoredFiles
from pipeline.data.sources.samples import SampleScanner, items_of_sample, split_extension
from pipeline.errors import UserError

NAME = "zip"
ENCRYPTED = 1  # bit in the flags of a member
# errors of reading a damaged archive or an unsupported compression
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)


def matches(path: str) -> bool:
    return path.lower().endswith(".zip")


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    return archives.scan_archives(NAME, uri, files, options, matches, scan_file)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    """Labels, folders and tables in a zip, and fragments of consecutive members sorted by name. Raises UserError for a
    file that is not a zip archive or has a damaged directory."""
    found = SampleScanner.new(options.columns, archives.member_filter(path, options), size, uri)
    fragments: list[tuple[str, int, int, int, list[str] | None]] = []
    try:
        with storage.open_file(uri) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive, found.ignored)
            first = held = 0
            for number, (name, member) in enumerate(members):
                if found.starts_sample(name) and held >= options.unit_bytes:
                    fragments.append((path, held, first, number, None))
                    first, held = number, 0
                held += member.compress_size
                found.add(name, member.file_size, functools.partial(_read, archive, member))
            fragments.append((path, held, first, len(members), None))
    except FileNotFoundError:
        raise
    except DAMAGE as error:
        if _is_tar(uri):
            raise UserError(f"{uri}: a tar archive with the name of a zip archive; rename it to .tar") from error
        raise UserError(f"{uri}: not a zip archive, or damaged or encrypted ({error})") from error
    found.finish()
    return found.scan(fragments if members else [], [tuple(name for name, _ in members[:8])])


def _is_tar(uri: str) -> bool:
    with storage.open_file(uri) as file:
        head = file.read(512)
    return head[257:262] == b"ustar" or head[:2] == b"\x1f\x8b"


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(source, fragments, _read_fragment)


def _read_fragment(uri: str, name: str, fragment: dict[str, Any], source: Source) -> Iterator[Item]:
    try:
        with storage.open_file(uri) as file, zipfile.ZipFile(file) as archive:
            parts: dict[str, tuple[str, bytes]] = {}
            current = ""
            for member_name, member in _members(archive, IgnoredFiles())[fragment["start"] : fragment["stop"]]:
                stem, extension = split_extension(member_name)
                if parts and (stem != current or extension in parts):
                    yield from items_of_sample(parts, name, fragment["labels"], source)
                    parts = {}
                current = stem
                held = member.file_size + sum(len(data) for _, data in parts.values())
                refused = too_large(held) if held > items.MAX_FILE_BYTES else None
                try:
                    data = b"" if refused else _read(archive, member, items.MAX_FILE_BYTES)
                except DAMAGE as error:
                    refused = Refused("encrypted" if member.flag_bits & ENCRYPTED else "unreadable", str(error))
                if refused:
                    yield Item(member_name, f"{name}/{member_name}", b"", None, refused)
                    continue
                parts[extension] = (member_name, data)
            if parts:
                yield from items_of_sample(parts, name, fragment["labels"], source)
    except DAMAGE as error:
        yield Item(
            f"{name}@{fragment['start']}", uri, b"", None, Refused("unreadable", f"the archive is truncated: {error}")
        )


def _members(archive: zipfile.ZipFile, ignored: IgnoredFiles) -> list[tuple[str, zipfile.ZipInfo]]:
    """(path with forward slashes, member) of the files, sorted so that the members
    of a sample are next to each other."""
    named = ((member.filename.replace("\\", "/").removeprefix("./"), member) for member in archive.infolist())
    found = [(name, member) for name, member in named if not name.endswith("/") and not ignored.has(name)]
    return sorted(found, key=lambda pair: (split_extension(pair[0])[0], pair[0]))


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    with archive.open(member) as file:
        return file.read(limit)
