"""The vocabulary of this package: a Source is a table of fragments, and reading a fragment yields Items."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pipeline.data.codecs import Refused
from pipeline.data.sources.columns import Columns
from pipeline.data.sources.naming import Naming
from pipeline.data.sources.tables import LabelTable

MAX_FILE_BYTES = 128 << 20  # no image is larger; a larger member of an archive is a decompression bomb

FRAGMENTS = pa.schema(
    [
        ("path", pa.large_string()),  # relative to the source; "" when the source is one file
        ("size", pa.int64()),  # bytes of input, so that units of even work can be cut
        ("start", pa.int64()),  # byte offset (tar), first row group (Parquet); else 0
        ("stop", pa.int64()),  # end of the range; -1 for the end of the file
        ("labels", pa.list_(pa.string())),  # label names known without reading the fragment, or null
        ("split", pa.string()),  # the split that the source puts the fragment in, or null
    ]
)
LISTING = pa.schema([FRAGMENTS.field("path"), FRAGMENTS.field("size")])


class Item(NamedTuple):
    """One input. `image` is the file's bytes or uint8 pixels (H, W, 3); `labels` are names, None when there is no label.
    An input that cannot be read has `refused` and no image."""

    key: str
    source: str
    image: bytes | np.ndarray
    labels: Sequence[str] | None
    refused: Refused | None = None
    split: str | None = None  # where the source has splits


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What the scan of one source found. `names` are its label names; None when only reading every image would tell."""

    uri: str
    kind: str  # NAME of the format
    fragments: pa.Table
    names: frozenset[str] | None
    prefix: str = ""  # goes before every key when there are several sources
    ordered_names: tuple[str, ...] | None = None  # when the source itself says which index has which name
    multilabel: bool = False
    splits: tuple[str, ...] = ()  # the splits that the source itself has
    naming: Naming = field(default_factory=Naming)  # for archives: what tables and folders say about their members
    columns: Columns = field(default_factory=Columns)  # that the user named
    by_folder: bool = False  # the names are those of folders
    by_archive: bool = False  # archives repeat each other's keys: the archive's name goes before each key
    apart: bool = False  # members of one sample lie apart in an archive
    problem: str = ""  # why an archive could not be scanned to its end
    hint: str = ""  # where labels may be, when there are none

    @property
    def listed(self) -> bool:
        """Every fragment is one file, so any order of fragments is a shuffle of the images."""
        return self.kind == "folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanOptions:
    """What the user said about the sources, for every format's `scan`."""

    table: LabelTable = field(default_factory=LabelTable)
    """Labels given by the user."""
    columns: Columns = field(default_factory=Columns)
    """Columns that the user named."""
    class_level: int | None = None
    """Which folder names the class: 1 is the first below the source. None: found."""
    unlabelled: bool = False
    """Whether images are wanted without labels."""
    include: tuple[str, ...] = ()
    """Globs over keys, of which one must match; none takes every key."""
    need_names: bool = True
    """Whether the label names are needed, which for archives means reading them."""
    unit_bytes: int = 1 << 30
    """Files larger than this are cut into several fragments where the format allows it."""
    prefix: str = ""
    """Goes before every key of the source."""


class SourceFormat(Protocol):
    """One layout of images: a module of this package with these names, listed in `discovery.FORMATS`."""

    NAME: str

    def matches(self, path: str) -> bool:
        """Whether a file of this name belongs to the format."""

    def scan(self, uri: str, files: pa.Table, options: ScanOptions) -> Source:
        """Finds fragments and label names. `files` is the listing of `uri`; raises UserError for unusable input."""

    def read(self, source: Source, fragments: pa.Table) -> Iterator[Item]:
        """The items of some fragments, in order. An input that cannot be read is an Item with `refused`."""


def fragments_of_files(files: pa.Table, labels: pa.Array, splits: pa.Array | None = None) -> pa.Table:
    """Every file of a listing as a fragment."""
    starts, stops = (pa.array(np.full(files.num_rows, value, np.int64)) for value in (0, -1))
    splits = pa.nulls(files.num_rows, pa.string()) if splits is None else splits
    return pa.table([files["path"], files["size"], starts, stops, labels, splits], schema=FRAGMENTS)


def is_included(key: str, include: tuple[str, ...]) -> bool:
    """Whether a key matches one of the globs, or there are none."""
    return not include or any(fnmatch.fnmatch(key, glob) for glob in include)


def too_large(size: int) -> Refused:
    return Refused("too many bytes", f"{size:,}, the limit is {MAX_FILE_BYTES:,}")
