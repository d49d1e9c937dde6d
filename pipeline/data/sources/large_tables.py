"""Label tables with more rows than fit in memory: Parquet, CSV, TSV, text and JSON lines, divided into chunks.

A first pass over the chunks collects the distinct values of each column, which decide what the columns mean, by the same
functions as for small tables. `LargeTable.labelled_batches` then reads the rows of a chunk, and `label_join` joins them with files.
"""

import csv
import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa

from pipeline import storage, workqueue
from pipeline.data.sources.columns import (
    SYNSET,
    Columns,
    as_text,
    captions_error,
    column_labels,
    is_flag,
    is_missing,
    is_one,
    look_like_captions,
    named_column,
    named_one_hot,
    no_label_column,
    normalised_name,
    split_column,
    split_name,
)
from pipeline.data.sources.parquet import OpenParquet
from pipeline.data.sources.parquet_batches import read_batches
from pipeline.data.sources.rows import (
    MAX_ROWS_PER_BYTE,
    MIN_ROWS,
    TABLE_SUFFIXES,
    TextLayout,
    parse_list,
    rows_of_text,
    text_layout,
)
from pipeline.data.sources.tables import LabelTable, file_column, key_of, no_key, read_label_table
from pipeline.data.sources.words import LABEL_COLUMNS, LIKELY_SPLIT_COLUMNS, SPLIT_COLUMNS, TRAINING_COLUMNS
from pipeline.errors import StorageError, UserError

LARGE_ROWS = 2_000_000  # rows of a Parquet file; smaller tables are read at once
LARGE_BYTES = 64 << 20  # of a text file, which has about as many rows
CHUNK_BYTES = 8 << 20  # of a chunk of text
CHUNK_ROWS = 1 << 18  # of a chunk of Parquet, which has whole row groups
HEAD_BYTES = 4 << 20  # of text, which decide how it is divided into columns
MAX_LINE = 8 << 20  # length of a line in bytes
MAX_RATIO = 64  # of the size of gzipped text after decompression to that before
MAX_VALUES = 1_000_000  # distinct values of a column of labels or splits
BATCH_ROWS = 1 << 14
BUFFER = 4 << 20  # bytes read at a time from a Parquet column

Batch = dict[str, list[Any]]
"""Values by column, of the same number of rows."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a table: row groups of Parquet, or the lines of text that start in a range of bytes."""

    start: int
    stop: int
    first: int = 0
    """Number of the rows before it."""


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Reads the chunks of a table, in any process."""

    uri: str
    names: tuple[str, ...]
    layout: TextLayout | None = None
    """Of delimited text; None for Parquet and JSON lines."""
    parquet: bool = False

    def batches(self, chunk: Chunk, columns: Sequence[str]) -> Iterator[Batch]:
        """The rows of a chunk. Raises UserError for damaged content."""
        if self.parquet:
            yield from self._parquet(chunk, columns)
            return
        rows = self._rows(chunk)
        while some := list(itertools.islice(rows, BATCH_ROWS)):
            yield {name: [row.get(name) for row in some] for name in columns}

    def _parquet(self, chunk: Chunk, columns: Sequence[str]) -> Iterator[Batch]:
        try:
            with OpenParquet(self.uri, BUFFER) as file:
                groups = range(chunk.start, chunk.stop)
                for batch in read_batches(self.uri, file, columns, groups=groups, rows=BATCH_ROWS):
                    yield batch.to_pydict()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.uri}: damaged Parquet file ({error})") from error

    def _rows(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        if self.layout is None:
            yield from map(self.parse_json, self.lines(chunk))
            return
        rows = rows_of_text(self.lines(chunk), self.layout)
        try:
            if self.layout.header and chunk.start == 0:
                next(rows, None)
            yield from rows
        except csv.Error as error:
            raise UserError(f"{self.uri}: cannot read the label table ({error})") from error

    def parse_json(self, line: str) -> dict[str, Any]:
        """A row of JSON lines. Raises UserError if the line is not an object."""
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.uri}: cannot read the label table ({error})") from error
        if not isinstance(value, dict):
            raise UserError(
                f"{self.uri}: a row of the label table must be an object with a file name and a label, not {value!r:.80}"
            )
        return value

    def lines(self, chunk: Chunk) -> Iterator[str]:
        """The lines that start in a range of bytes, without blank ones."""
        with storage.open_file(self.uri) as raw:
            packed = self.uri.lower().endswith(".gz")
            most = MAX_RATIO * storage.file_size(self.uri) if packed else None
            file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            try:
                yield from self._decoded(file, chunk, most)
            except UnicodeDecodeError as error:
                raise UserError(f"{self.uri}: not UTF-8 text ({error}); save it as UTF-8") from error
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{self.uri}: not a gzipped file, or damaged ({error})") from error

    def _decoded(self, file: IO[bytes], chunk: Chunk, most: int | None) -> Iterator[str]:
        offset = chunk.start
        if offset:  # the line that starts before the chunk belongs to the chunk before
            file.seek(offset - 1)
            offset += len(file.readline()) - 1
        while offset < chunk.stop and (line := file.readline(MAX_LINE)):
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                raise UserError(f"{self.uri}: a line of more than {MAX_LINE:,} bytes at byte {offset:,}")
            if most is not None and offset > most:
                raise UserError(f"{self.uri}: unpacks to more than {most:,} bytes; unpack the table if it is right")
            text = line.decode("utf-8" if offset else "utf-8-sig").rstrip("\r\n")
            offset += len(line)
            if text.strip():
                yield text + "\n"


def open_chunks(uri: str, columns: Columns) -> tuple[Reader, list[Chunk]] | None:
    """The reader and the chunks of a large table; None for a table that is read at once. Raises UserError for a damaged
    file, StorageError for an outage."""
    name = uri.lower()
    if not name.removesuffix(".gz").endswith(TABLE_SUFFIXES) or name.removesuffix(".gz").endswith(".json"):
        return None
    try:
        if name.endswith((".parquet", ".parq", ".pq")):
            return _open_parquet(uri)
        size = storage.file_size(uri)
        if size < (LARGE_BYTES // 8 if name.endswith(".gz") else LARGE_BYTES):
            return None
        return _open_text(uri, size, [column for column in (columns.file, columns.label, columns.split) if column])
    except FileNotFoundError:
        return None


def _open_parquet(uri: str) -> tuple[Reader, list[Chunk]] | None:
    with OpenParquet(uri, BUFFER) as file:
        metadata = file.metadata
        if metadata.num_rows < LARGE_ROWS:
            return None
        limit = max(MIN_ROWS, MAX_ROWS_PER_BYTE * storage.file_size(uri))
        if metadata.num_rows > limit:
            raise UserError(f"{uri}: {metadata.num_rows:,} rows, more than the limit of {limit:,} for its size")
        chunks, first, rows, before = [], 0, 0, 0
        for group in range(metadata.num_row_groups):
            rows += metadata.row_group(group).num_rows
            if rows >= CHUNK_ROWS or group == metadata.num_row_groups - 1:
                chunks.append(Chunk(first, group + 1, before))
                first, before, rows = group + 1, before + rows, 0
        return Reader(uri=uri, names=tuple(file.schema_arrow.names), parquet=True), chunks


def _open_text(uri: str, size: int, named: Sequence[str]) -> tuple[Reader, list[Chunk]] | None:
    packed = uri.lower().endswith(".gz")
    if not packed and storage.read_bytes(uri, 0, min(size, 2)) in (b"\xff\xfe", b"\xfe\xff"):
        return None  # UTF-16
    plain = Reader(uri=uri, names=())
    head = [line.rstrip("\n") for line in plain.lines(Chunk(0, HEAD_BYTES))]
    if not head:
        return None
    starts = [0] if packed else list(range(0, size, CHUNK_BYTES))
    chunks = [Chunk(start, stop) for start, stop in itertools.pairwise([*starts, 1 << 62])]
    if uri.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        names = dict.fromkeys(name for row in map(plain.parse_json, head) for name in row)
        return dataclasses.replace(plain, names=tuple(names)), chunks
    layout = text_layout(head, uri, named)
    if layout.ambiguous:
        raise UserError(f"{uri}: several columns are numbers that do not repeat; give the table a line of column names")
    return dataclasses.replace(plain, names=tuple(layout.columns), layout=layout), chunks


# ---------------------------------------------------------------- what the columns mean


@dataclass(kw_only=True)
class Values:
    """The distinct values of a column."""

    cells: set[Hashable] | None = field(default_factory=set)
    """None: more than MAX_VALUES."""
    parts: set[Hashable] = field(default_factory=set)
    """Elements of cells that are lists."""
    uneven: bool = False
    """Whether a list has more or fewer elements than one."""

    def add(self, values: Iterable[Any], column: str) -> None:
        if self.cells is None:
            return
        for value in values:
            cell = cell_of(value, column)
            if isinstance(cell, list):
                self.parts.update(map(hashable, cell))
                self.uneven |= len(cell) != 1
            else:
                self.cells.add(cell)
        self._limit()

    def merge(self, other: "Values") -> None:
        if self.cells is None or other.cells is None:
            self.cells, self.parts = None, set()
            return
        self.cells |= other.cells
        self.parts |= other.parts
        self.uneven |= other.uneven
        self._limit()

    def _limit(self) -> None:
        if self.cells is not None and len(self.cells) + len(self.parts) > MAX_VALUES:
            self.cells, self.parts = None, set()


def cell_of(value: Any, column: str) -> Any:
    """A cell as a hashable value or a list. All missing numbers are None, since NaN differs from itself."""
    if isinstance(value, bytes):
        value = as_text(value)
    if column.lower() == "predictionstring":  # a synset and coordinates, which differ in every row
        match = SYNSET.search(str(value))
        return match[0] if match else None
    if isinstance(value, str):
        return parse_list(value) if value[:1] in ("[", "(", "{") else value
    if is_missing(value):
        return None
    return value if isinstance(value, list) else hashable(value)


def hashable(value: Any) -> Hashable:
    return value if isinstance(value, str | int | float | bool | bytes | None) else str(value)


@dataclass(kw_only=True)
class Profile:
    """What a pass over a chunk, or over all chunks, has found."""

    rows: int = 0
    values: dict[str, Values] = field(default_factory=dict)
    empty: int | None = None
    """Number of the first row without a file name, from 1."""
    quotes: int = 0
    """Number of quotation marks, in delimited text."""
    error: str = ""


def profile_chunk(chunk: Chunk, about: tuple[Reader, str, list[str]]) -> Profile:
    """The Profile of a chunk. about: the reader, the column of file names and the columns whose values are collected."""
    reader, file, columns = about
    found = Profile(values={name: Values() for name in columns})
    if reader.layout is not None and reader.layout.delimiter:
        found.quotes = sum(line.count('"') for line in reader.lines(chunk))
    try:
        for batch in reader.batches(chunk, [file, *columns]):
            keys = batch[file]
            if found.empty is None:
                missing = (i for i, value in enumerate(keys) if key_of(value) is None)
                found.empty = next((found.rows + i + 1 for i in missing), None)
            found.rows += len(keys)
            for name in columns:
                found.values[name].add(batch[name], name)
    except StorageError:
        raise
    except UserError as error:  # it may come from a boundary of chunks in a quoted cell
        found.error = str(error)
    return found


def profile_table(reader: Reader, chunks: list[Chunk], file: str, columns: list[str]) -> tuple[Profile, list[Chunk]]:
    """The Profile of a table, and its chunks with the numbers of their rows. Raises UserError for unreadable rows."""
    found: dict[str, Profile] = {}
    total = Profile(values={name: Values() for name in columns})
    units = {f"chunk-{i:06d}": chunk for i, chunk in enumerate(chunks)}
    for outcome in workqueue.run(units, profile_chunk, context=(reader, file, columns)):
        if outcome.error:
            raise outcome.error
        for name, values in outcome.summary.values.items():
            total.values[name].merge(values)
        found[outcome.name] = dataclasses.replace(outcome.summary, values={})
    inside, merged, numbered = 0, list[Chunk](), list[Chunk]()
    for name, chunk in units.items():
        if inside % 2:  # the chunk starts in a quoted cell
            merged[-1] = dataclasses.replace(merged[-1], stop=chunk.stop)
        else:
            merged.append(chunk)
        inside += found[name].quotes
    if len(merged) < len(chunks):
        return profile_table(reader, merged, file, columns)
    for name, chunk in units.items():
        about = found[name]
        if about.error:
            raise UserError(about.error)
        if about.empty is not None:
            raise no_key(reader.uri, total.rows + about.empty, file)
        numbered.append(dataclasses.replace(chunk, first=total.rows))
        total.rows += about.rows
    if not total.rows:
        raise UserError(f"{reader.uri}: the label table has no rows")
    return total, numbered


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class LargeTable(LabelTable):
    """A label table that stays in its file. Its rows are read in chunks, in any process."""

    reader: Reader
    chunks: list[Chunk] = field(default_factory=list)
    rows: int = 0
    file: str = ""
    """The column of file names."""
    label: str | None = None
    names: dict[Hashable, list[str] | None] = field(default_factory=dict)
    """{value of the label column, or of an element of a list in it: label names}."""
    one_hot: list[str] = field(default_factory=list)
    split: str | None = None
    split_names: dict[Hashable, str | None] = field(default_factory=dict)

    @property
    def in_memory(self) -> bool:
        return False

    @property
    def keys(self) -> Iterable[str]:
        raise TypeError("the rows of a large table are not in memory")

    def __contains__(self, key: str) -> bool:
        raise TypeError("the rows of a large table are not in memory")

    def labelled_batches(self, chunk: Chunk) -> Iterator[tuple[list[str], list[list[str] | None], list[str | None]]]:
        """(file names, label names, splits) of rows of a chunk."""
        columns = [self.file, *([self.label] if self.label else []), *self.one_hot]
        columns += [self.split] if self.split and self.split not in columns else []
        for batch in self.reader.batches(chunk, columns):
            keys = [_encodable(key_of(value) or "") for value in batch[self.file]]
            labels: list[list[str] | None] = [None] * len(keys)
            if self.label:
                labels = [self._labels(cell_of(value, self.label)) for value in batch[self.label]]
            elif self.one_hot:
                flags = zip(*(batch[name] for name in self.one_hot), strict=True)
                labels = [[n for n, value in zip(self.one_hot, row, strict=True) if is_one(value)] for row in flags]
            splits: list[str | None] = [None] * len(keys)
            if self.split:
                splits = [self.split_names.get(hashable(cell_of(value, self.split))) for value in batch[self.split]]
            yield keys, labels, splits

    def _labels(self, cell: Any) -> list[str] | None:
        if isinstance(cell, list):
            return [name for part in cell for name in self.names[hashable(part)] or ()]
        found = self.names[cell]
        return None if found is None else list(found)


def open_label_table(uri: str, columns: Columns | None = None, need_labels: bool = True) -> LabelTable:
    """The label table at `uri`: read at once (`read_label_table`), or a LargeTable. Raises UserError."""
    columns = columns or Columns()
    found = open_chunks(uri, columns)
    if found is None:
        return read_label_table(uri, columns, need_labels=need_labels)
    reader, chunks = found
    file = file_column(uri, reader.names, columns)
    others = [name for name in reader.names if name != file]
    profile, chunks = profile_table(reader, chunks, file, _deciding(others, columns))
    split = split_column(others, columns.split, lambda name: profile.values[name].cells or [""])
    split_names = {cell: split_name(cell, split) for cell in _distinct(uri, profile, split)} if split else {}
    if len({name for name in split_names.values() if name is not None}) < 2 and not columns.split:
        split_names = dict.fromkeys(split_names)
    others = [name for name in others if name != split]
    one_hot = named_one_hot(columns.label, others)
    label = None if one_hot else named_column(others, LABEL_COLUMNS, columns.label, "--label-column")
    needed = need_labels and not split
    names: dict[Hashable, list[str] | None] = {}
    multilabel = False
    if label:
        names, multilabel = _label_names(uri, profile, label)
        if needed and not columns.label and not multilabel:
            distinct = {name for found in names.values() for name in found or ()}
            if look_like_captions(distinct, profile.rows):
                raise captions_error(uri, distinct, profile.rows, f"--label-column {label!r}")
    elif not one_hot:
        cells = {name: profile.values[name].cells for name in others if name in profile.values}
        flags = [name for name in others if cells.get(name) and all(map(is_flag, cells[name] or ()))]
        one_hot = flags if len(flags) == len(others) > 1 else []
    has_labels = bool(one_hot) or any(found is not None for found in names.values())
    if not has_labels and needed:
        distinct_cells = {n: list(profile.values[n].cells or ()) for n in others if n in profile.values and n != label}
        raise no_label_column(uri, [name for name in others if name != label], distinct_cells)
    return LargeTable(
        uri=uri,
        multilabel=multilabel,
        whole_has_labels=has_labels,
        reader=reader,
        chunks=chunks,
        rows=profile.rows,
        file=file,
        label=label if has_labels else None,
        names=names,
        one_hot=one_hot,
        split=split if any(split_names.values()) else None,
        split_names=split_names,
    )


def _deciding(names: Sequence[str], columns: Columns) -> list[str]:
    """The columns whose values decide what is a label or a split: all of them, unless the name of a column says that it
    is the label."""
    others = [name for name in names if name != columns.split]
    if named_one_hot(columns.label, others):
        label = []
    elif found := named_column(others, LABEL_COLUMNS, columns.label, "--label-column"):
        label = [found]
    else:
        return list(names)
    splits = [named_column(names, SPLIT_COLUMNS, columns.split, "--split-column")]
    splits += [name for name in names if normalised_name(name) in (*LIKELY_SPLIT_COLUMNS, *TRAINING_COLUMNS)]
    return list(dict.fromkeys([*label, *(name for name in splits if name)]))


def _distinct(uri: str, profile: Profile, column: str) -> set[Hashable]:
    cells = profile.values[column].cells
    if cells is None:
        raise UserError(
            f"{uri}: column {column} has more than {MAX_VALUES:,} different values, which are no classes or splits; name "
            "another column with --label-column or --split-column, or write several labels of an image as a list"
        )
    return cells


def _label_names(uri: str, profile: Profile, label: str) -> tuple[dict[Hashable, list[str] | None], bool]:
    """({value of a cell, or element of a list in a cell: label names}, whether the table is multi-label)."""
    cells, parts = list(_distinct(uri, profile, label)), list(profile.values[label].parts)
    some_lists: list[Any] = [[part] for part in parts] + ([[]] if profile.values[label].uneven else [])
    found, multilabel = column_labels([*cells, *some_lists], label)
    names = dict(zip(cells, found, strict=False))
    names |= dict(zip(parts, found[len(cells) :], strict=False))
    return names, multilabel


def _encodable(name: str) -> str:
    """A file name with the escapes of listings in place of characters that UTF-8 does not have."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()
