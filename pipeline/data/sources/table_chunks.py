"""Divides label tables with more rows than fit in memory into chunks, and reads the rows of a chunk."""

import csv
import dataclasses
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from pipeline import storage, workqueue
from pipeline.data.sources.columns import Columns
from pipeline.data.sources.parquet import OpenParquet
from pipeline.data.sources.parquet_batches import read_batches
from pipeline.data.sources.rows import (
    MAX_ROWS_PER_BYTE,
    MIN_ROWS,
    TABLE_SUFFIXES,
    TextLayout,
    rows_of_text,
    text_layout,
)
from pipeline.errors import UserError

LARGE_ROWS = 2_000_000  # rows of a Parquet file; smaller tables are read at once
LARGE_BYTES = 64 << 20  # of a text file, which has about as many rows
CHUNK_BYTES = 8 << 20  # of a chunk of text
CHUNK_ROWS = 1 << 18  # of a chunk of Parquet, which has whole row groups
HEAD_BYTES = 4 << 20  # of text, which decide how it is divided into columns
MAX_LINE = 8 << 20  # length of a line in bytes
MAX_RATIO = 64  # of the size of gzipped text after decompression to that before
MAX_COLUMNS = 10_000  # of JSON lines
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkReader:
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
        lines = itertools.islice(self.lines(chunk), self.layout.skip if chunk.start == 0 else 0, None)
        rows = rows_of_text(lines, self.layout)
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
                f"{self.uri}: a row of the label table must be an object with a file name and a label, not a {type(value).__name__}"
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
            offset += len(self._line(file, offset - 1)) - 1
        while offset < chunk.stop and (line := self._line(file, offset)):
            if most is not None and offset > most:
                raise UserError(f"{self.uri}: unpacks to more than {most:,} bytes; unpack the table if it is right")
            text = line.decode("utf-8" if offset else "utf-8-sig")
            offset += len(line)
            yield from (part + "\n" for part in text.splitlines() if part.strip())  # also ends such as \r alone

    def _line(self, file: IO[bytes], offset: int) -> bytes:
        """The bytes up to the next \\n. Raises UserError if there are more than MAX_LINE."""
        line = file.readline(MAX_LINE)
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            raise UserError(f"{self.uri}: a line of more than {MAX_LINE:,} bytes at byte {offset:,}")
        return line

    def quoting(self, chunk: Chunk) -> tuple[int, tuple[bool, bool]]:
        """(number of lines, whether a quoted cell is open after the chunk). The latter for a chunk that starts outside a
        quoted cell, and for a chunk that starts in one."""
        if self.layout is None or not self.layout.delimiter:
            skips = self.layout is not None and self.layout.skip
            return sum(1 for _ in self.lines(chunk)) if skips else 1, (False, False)
        lines, outside, inside = 0, False, True
        open_cell = open_cell_pattern(self.layout.delimiter)
        for lines, line in enumerate(self.lines(chunk), 1):  # noqa: B007
            if '"' in line:
                after = {start: bool(open_cell.fullmatch('"' * start + line[:-1])) for start in {outside, inside}}
                outside, inside = after[outside], after[inside]
        return lines, (outside, inside)

    def names_of(self, chunk: Chunk) -> list[str]:
        """The names of columns in a chunk of JSON lines, in order. Raises UserError if there are too many."""
        names: dict[str, None] = {}
        for row in self._rows(chunk):
            names.update(dict.fromkeys(row))
            self.check_columns(names)
        return list(names)

    def check_columns(self, names: Sequence[str] | dict[str, None]) -> None:
        if len(names) > MAX_COLUMNS:
            raise UserError(f"{self.uri}: more than {MAX_COLUMNS:,} names of columns; write rows with the same names")


def open_cell_pattern(delimiter: str) -> re.Pattern[str]:
    """Matches lines that end in a quoted cell, by the rules of `csv.reader`: a quotation mark opens a cell only at its
    start, two of them stand for one, and the text between a closing one and the delimiter is literal."""
    end = f"[^{delimiter}]*+[{delimiter}]"
    opened = r' *+"(?:[^"]++|"")*+'
    return re.compile(rf'(?:{opened}"{end}| *+(?!"){end})*+{opened}')


def all_names(reader: ChunkReader, chunks: list[Chunk]) -> ChunkReader:
    """The reader of JSON lines with the names of all columns, which may differ between rows. Raises UserError."""
    units = {f"chunk-{i:06d}": chunk for i, chunk in enumerate(chunks)}
    found: dict[str, list[str]] = {}
    for outcome in workqueue.run(units, names_of_chunk, context=reader):
        if outcome.error:
            raise outcome.error
        found[outcome.name] = outcome.summary
    names = list(dict.fromkeys(name for unit in units for name in found[unit]))
    reader.check_columns(names)
    return dataclasses.replace(reader, names=tuple(names))


def names_of_chunk(chunk: Chunk, reader: ChunkReader) -> list[str]:
    return reader.names_of(chunk)


def open_chunks(uri: str, columns: Columns) -> tuple[ChunkReader, list[Chunk]] | None:
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


def _open_parquet(uri: str) -> tuple[ChunkReader, list[Chunk]] | None:
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
        return ChunkReader(uri=uri, names=tuple(file.schema_arrow.names), parquet=True), chunks


def _open_text(uri: str, size: int, named: Sequence[str]) -> tuple[ChunkReader, list[Chunk]] | None:
    packed = uri.lower().endswith(".gz")
    if not packed and storage.read_bytes(uri, 0, min(size, 2)) in (b"\xff\xfe", b"\xfe\xff"):
        return None  # UTF-16
    plain = ChunkReader(uri=uri, names=())
    head = [line.rstrip("\n") for line in plain.lines(Chunk(0, HEAD_BYTES))]
    if not head:
        return None
    starts = [0] if packed else list(range(0, size, CHUNK_BYTES))
    chunks = [Chunk(start, stop) for start, stop in itertools.pairwise([*starts, 1 << 62])]
    if uri.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return all_names(plain, chunks), chunks
    try:
        layout = text_layout(head, uri, named)
    except csv.Error as error:
        raise UserError(f"{uri}: cannot read the label table ({error})") from error
    if layout.ambiguous:
        raise UserError(f"{uri}: several columns are numbers that do not repeat; give the table a line of column names")
    return dataclasses.replace(plain, names=tuple(layout.columns), layout=layout), chunks
