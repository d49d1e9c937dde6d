"""The types of this package: a Source is a table of fragments, and reading a fragment yields Items."""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pipeline.data.codecs import Refused
from pipeline.data.downloads.config import DownloadConfig
from pipeline.data.sources.columns import Columns
from pipeline.data.sources.naming import Naming
from pipeline.data.sources.tables import LabelTable

MAX_FILE_BYTES = 128 << 20  # larger files are refused: in archives they are usually decompression bombs

FRAGMENTS = pa.schema(
    [
        ("path", pa.large_string()),  # relative to the source; "" when the source is one file
        ("size", pa.int64()),  # bytes of input, so that work can be divided evenly
        ("start", pa.int64()),  # byte offset (tar), first row group (Parquet); else 0
        ("stop", pa.int64()),  # end of the range; -1 for the end of the file
        ("labels", pa.list_(pa.string())),  # label names that are known before the fragment is read, or null
        ("split", pa.string()),  # the split of the fragment in the source, or null
        ("row", pa.int64()),  # number of the first row in the file (lists of URLs), or NO_ROW; else 0
    ]
)
NO_ROW = -1  # an image that is not in the label table
LISTING = pa.schema([FRAGMENTS.field("path"), FRAGMENTS.field("size")])


@dataclass(frozen=True, kw_only=True, slots=True)
class Downloads:
    """What the user said about the images of lists of URLs."""

    config: DownloadConfig = field(default_factory=DownloadConfig)
    url_column: str | None = None
    allow_private: bool = False
    need_labels: bool = False
    """Whether rows without a label are rejected, so that their images need not be downloaded."""
    keep_rows: bool = False
    """Whether the items have the columns of their rows."""


class Item(NamedTuple):
    """One input. `image` is the bytes of the file or uint8 pixels (H, W, 3); `labels` are label names, or None without
    a label. An unreadable input has `refused` set and no image."""

    key: str
    source: str
    image: bytes | np.ndarray
    labels: Sequence[str] | None
    refused: Refused | None = None
    split: str | None = None  # if the source has splits
    row: dict[str, Any] | None = None  # the columns of a row of a list of URLs, if `Downloads.keep_rows` is set


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The result of scanning one source. `names` are its label names, or None if
    they are unknown before all images are read."""

    uri: str
    kind: str  # NAME of the format
    fragments: pa.Table
    names: frozenset[str] | None
    prefix: str = ""  # put before every key if there are several sources
    ordered_names: tuple[str, ...] | None = None  # class names by index, if the source states them
    multilabel: bool = False
    splits: tuple[str, ...] = ()  # the splits that the source defines; with "" if some images have none
    naming: Naming = field(default_factory=Naming)  # for archives: labels and splits from tables and folders
    columns: Columns = field(default_factory=Columns)  # the columns that the user named
    by_folder: bool = False  # whether `names` are folder names
    by_archive: bool = False  # whether keys repeat between archives, so that the archive's name is put before each key
    scattered: bool = False  # whether the members of a sample are not next to each other in an archive
    problem: str = ""  # why an archive could not be scanned to its end, if so
    hint: str = ""  # where labels may be, if none were found
    stamp: str = ""  # changes with the content, for lists of URLs: the sizes of fragments do not show a change
    missing: int = 0  # rows of large label tables without a file, which are the last fragments
    missing_example: str = ""  # path of such a row
    need_labels: bool = True  # whether images without a row in the label table are rejected
    downloads: Downloads | None = None  # for lists of URLs
    # For lists of URLs, whose `read` selects rows before it downloads their images:
    include: tuple[str, ...] = ()  # globs over keys
    only: frozenset[int] | None = None  # numbers of the rows to read, among the included ones; None: all
    limit: int = -1  # maximum number of items; -1: all

    @property
    def one_image_per_fragment(self) -> bool:
        """Whether every fragment is one image file, so that shuffling fragments shuffles the images."""
        return self.kind == "folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanOptions:
    """The user's options for reading sources; every format's `scan` takes them."""

    table: LabelTable = field(default_factory=LabelTable)
    """Labels given by the user."""
    columns: Columns = field(default_factory=Columns)
    """Columns that the user named."""
    class_level: int | None = None
    """The level of the class folders; 1 is the first below the source. None: detect it."""
    unlabelled: bool = False
    """Whether to accept images without labels."""
    include: tuple[str, ...] = ()
    """Globs over keys, one of which must match; empty: every key is included."""
    need_names: bool = True
    """Whether label names are needed. For archives that means reading the archives."""
    unit_bytes: int = 1 << 30
    """Larger files are divided into several fragments if the format allows it."""
    prefix: str = ""
    """Put before every key of the source."""
    downloads: Downloads = field(default_factory=Downloads)
    """For lists of URLs."""


class SourceFormat(Protocol):
    """The interface of a format: a module of this package that defines these names
    and is listed in `discovery.FORMATS`."""

    NAME: str

    def matches(self, path: str) -> bool:
        """Whether a file of this name belongs to the format."""

    def scan(self, uri: str, files: pa.Table, options: ScanOptions) -> Source:
        """Finds fragments and label names. `files` is the listing of `uri`. Raises UserError for unusable input."""

    def read(self, source: Source, fragments: pa.Table) -> Iterator[Item]:
        """The items of some fragments, in order. The Item of an unreadable input has `refused` set."""


def fragments_of_files(files: pa.Table, labels: pa.Array, splits: pa.Array | None = None) -> pa.Table:
    """Every file of a listing as a fragment."""
    starts, stops = (pa.array(np.full(files.num_rows, value, np.int64)) for value in (0, -1))
    splits = pa.nulls(files.num_rows, pa.string()) if splits is None else splits
    return pa.table([files["path"], files["size"], starts, stops, labels, splits, starts], schema=FRAGMENTS)


def with_rows(fragments: pa.Table, rows: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The fragments with another column `row`."""
    return fragments.set_column(FRAGMENTS.get_field_index("row"), FRAGMENTS.field("row"), rows)


def is_included(key: str, include: tuple[str, ...]) -> bool:
    """Whether a key matches one of the globs, or there are no globs."""
    return not include or any(fnmatch.fnmatch(key, glob) for glob in include)


def too_large(size: int) -> Refused:
    return Refused("too many bytes", f"{size:,}, the limit is {MAX_FILE_BYTES:,}")
