"""Names of the revisions of a dataset and of their files (pipeline/data/format/revisions.py).

Imports no library, because --help needs it."""

import re

from pipeline import storage

MANIFEST = "manifest.json"
DELETED = "deleted.parquet"
REPORTS = ("rejects.parquet", "duplicates.parquet", "duplicates.png", DELETED)
_ADDRESS = re.compile(r"(.*[^/])@([1-9][0-9]{0,5})")
_NUMBERED = re.compile(r"part-r([0-9]{4,6})-.*|\w+@([1-9][0-9]{0,5})\.\w+")


def split_address(uri: str) -> tuple[str, int | None]:
    """("s3://bucket/photos", 2) of s3://bucket/photos@2; the revision is None without one, or where a folder of that
    name has a dataset."""
    match = _ADDRESS.fullmatch(uri)
    if match is None or storage.exists(storage.join(uri, MANIFEST)):
        return uri, None
    return match[1], int(match[2])


def name_of(name: str, revision: int) -> str:
    """The file name of a report or older manifest of a revision: rejects@2.parquet."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}@{revision}.{ending}"


def report_name(name: str, revision: int) -> str:
    """The file name of a report: rejects.parquet, or of later revisions rejects@2.parquet."""
    return name if revision == 1 else name_of(name, revision)


def manifest_uri(uri: str) -> str:
    """The manifest of a dataset or of one of its revisions (`FOLDER@2`), whether or not it exists."""
    folder, revision = split_address(storage.normalise(uri))
    if revision is None:
        return storage.join(folder, MANIFEST)
    older = storage.join(folder, name_of(MANIFEST, revision))
    return older if storage.exists(older) else storage.join(folder, MANIFEST)


def shard_prefix(revision: int) -> str:
    """How the names of the shards that a later revision writes begin, after `part-`."""
    return f"r{revision:04d}-"


def is_report(name: str) -> bool:
    """Whether a file is a report of some revision."""
    return re.sub(r"@[1-9][0-9]{0,5}(?=\.\w+$)", "", name) in REPORTS


def is_of_later_revision(name: str, newest: int) -> bool:
    """Whether a file is a shard or report of a revision that is not published yet."""
    match = _NUMBERED.fullmatch(name)
    return match is not None and int(match[1] or match[2]) > newest
