"""The vocabulary of this package: a Source is a table of pieces, and reading a piece yields Items."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from pipeline.data.images import Refused

IMAGE_NAMES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2", "avif")
MAX_FILE_BYTES = 128 << 20  # no image is larger; a larger member of an archive is a decompression bomb

PIECES = pa.schema(
    [
        ("path", pa.large_string()),  # relative to the source; "" when the source is one file
        ("size", pa.int64()),  # bytes of input, so that units of even work can be cut
        ("start", pa.int64()),  # byte offset (tar), first row group (Parquet); else 0
        ("stop", pa.int64()),  # end of the range; -1 for the end of the file
        ("labels", pa.list_(pa.string())),  # label names known without reading the piece, or null
    ]
)
LISTING = pa.schema([PIECES.field("path"), PIECES.field("size")])


class Item(NamedTuple):
    """One input. `image` is the file's bytes or uint8 pixels (H, W, 3); `labels` are names, None when there is no label.
    An input that cannot be read has `refused` and no image."""

    key: str
    source: str
    image: bytes | np.ndarray
    labels: Sequence[str] | None
    refused: Refused | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What the scan of one source found. `names` are its label names; None when only reading every image would tell."""

    uri: str
    kind: str  # NAME of the format
    pieces: pa.Table
    names: frozenset[str] | None
    prefix: str = ""  # goes before every key when there are several sources
    ordered_names: tuple[str, ...] | None = None  # when the source itself says which index has which name
    multilabel: bool = False
    table: dict[str, list[str]] = field(default_factory=dict)  # file name -> labels, for archives
    by_folder: bool = False  # the names are those of folders
    by_archive: bool = False  # archives repeat each other's keys: the archive's name goes before each key
    problem: str = ""  # why an archive could not be scanned to its end

    @property
    def listed(self) -> bool:
        """Every piece is one file, so any order of pieces is a shuffle of the images."""
        return self.kind == "folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanOptions:
    """What the user said about the sources, for every format's `scan`."""

    table: dict[str, list[str]] = field(default_factory=dict)
    """Labels given by the user: file name -> label names."""
    multilabel: bool = False
    """Whether that table gives a file several labels."""
    include: str | None = None
    """Glob over keys."""
    need_names: bool = True
    """Whether the label names are needed, which for archives means reading them."""
    unit_bytes: int = 1 << 30
    """Files larger than this are cut into several pieces where the format allows it."""
    prefix: str = ""
    """Goes before every key of the source."""


class SourceFormat(Protocol):
    """One layout of images: a module of this package with these names, listed in `discovery.FORMATS`."""

    NAME: str

    def matches(self, path: str) -> bool:
        """Whether a file of this name belongs to the format."""

    def scan(self, uri: str, files: pa.Table, options: ScanOptions) -> Source:
        """Finds pieces and label names. `files` is the listing of `uri`; raises UserError for unusable input."""

    def read(self, source: Source, pieces: pa.Table) -> Iterator[Item]:
        """The items of some pieces, in order. An input that cannot be read is an Item with `refused`."""


def pieces_of_files(files: pa.Table, labels: pa.Array) -> pa.Table:
    """Every file of a listing as a piece."""
    starts, stops = (pa.array(np.full(files.num_rows, value, np.int64)) for value in (0, -1))
    return pa.table([files["path"], files["size"], starts, stops, labels], schema=PIECES)


def too_large(size: int) -> Refused:
    return Refused("too many bytes", f"{size:,}, the limit is {MAX_FILE_BYTES:,}")
