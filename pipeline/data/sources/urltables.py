"""Tables of lists of URLs, read a range of rows at a time: Parquet, and text by lines (CSV, TSV, JSON lines, plain addresses).

`rows.read_rows` reads a complete label table. A list of URLs may be larger than memory, so a file is divided into spans
that are read independently: of rows in Parquet, of bytes in text. Gzipped text before a span is decompressed and skipped.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipeline import storage
from pipeline.data.sources.parquet import OpenParquet
from pipeline.data.sources.parquet_batches import read_batches
from pipeline.errors import UserError

TEXT = re.compile(r"(?i)\.(csv|tsv|txt|lst|list|jsonl|ndjson)(\.gz)?$")
PARQUET = re.compile(r"(?i)\.(parquet|parq|pq)$")
ADDRESS = re.compile(r"(?i)\s*https?://")
MAX_LINE = 8 << 20  # maximum length of a line in bytes
SNIFFED_ROWS = 100  # number of rows that determine the columns
SPANS = 64  # approximate number of spans of a file
SPAN_ROWS = (64, 4096)  # minimum and maximum rows of a span
SPAN_BYTES = 16 << 20  # rows of text that are in memory at a time; a span of longer rows has fewer
BUFFER = 4 << 20  # bytes read at a time from a Parquet column
BATCH_ROWS = 1024


def matches(path: str) -> bool:
    return bool(TEXT.search(path) or PARQUET.search(path))


@dataclass(frozen=True, slots=True)
class Span:
    """A range of rows. `start` and `stop` are what `Table.rows` takes; `first` is the number of its first row."""

    first: int
    rows: int
    start: int
    stop: int
    values: Iterable[dict[str, Any]] = ()
    """The rows, for text, which must be read to be divided."""


class Table(Protocol):
    """An open table."""

    schema: pa.Schema
    is_parquet: bool

    def stamp(self, column: str) -> str:
        """Identifies the content: for Parquet a hash of the metadata and one column, for text
        a hash of all rows, available after `spans`."""

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of all rows for Parquet; nothing for text, whose spans have the values."""

    def first_rows(self) -> list[dict[str, Any]]: ...

    def columns(self, names: Sequence[str]) -> Iterator[pa.Array]:
        """Values of each column; for text, those of the first rows."""

    def spans(self) -> Iterator[Span]: ...

    def rows(
        self, start: int, stop: int, first: int, columns: Sequence[str] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, values) of the rows of a span whose first row is number `first`. columns: None for all."""


@contextlib.contextmanager
def open_table(uri: str) -> Iterator[Table]:
    """Raises UserError for a file that is not a table, or is damaged; FileNotFoundError."""
    if PARQUET.search(uri):
        with OpenParquet(uri, BUFFER) as file:
            yield _ParquetTable(file, uri)
        return
    with storage.open_file(uri) as file:
        yield _TextTable(file, uri)


def _span_rows(rows: int) -> int:
    least, most = SPAN_ROWS
    return min(most, max(least, -(-rows // SPANS)))


# ---------------------------------------------------------------- Parquet


class _ParquetTable:
    is_parquet = True

    def __init__(self, file: pq.ParquetFile, uri: str) -> None:
        self._file, self._uri, self.schema = file, uri, file.schema_arrow

    def stamp(self, column: str) -> str:
        metadata = json.dumps(self._file.metadata.to_dict(), default=str, sort_keys=True)
        digest = xxhash.xxh3_128(metadata.encode("utf-8", "backslashreplace"))
        for batch in self.batches([column]):
            digest.update(batch.serialize())
        return digest.hexdigest()

    def first_rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for batch in read_batches(self._uri, self._file, self.schema.names, rows=SNIFFED_ROWS):
            rows += batch.to_pylist()
            if len(rows) >= SNIFFED_ROWS:
                break
        return rows[:SNIFFED_ROWS]

    def columns(self, names: Sequence[str]) -> Iterator[pa.Array]:
        for batch in self.batches(names):
            yield from batch.columns

    def spans(self) -> Iterator[Span]:
        total = self._file.metadata.num_rows
        size = _span_rows(total)
        for first in range(0, total, size):
            stop = min(total, first + size)

            yield Span(first, stop - first, first, stop)

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of all rows."""
        return read_batches(self._uri, self._file, names)

    def rows(
        self, start: int, stop: int, first: int, columns: Sequence[str] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        number, groups, skipped = 0, [], None
        for group in range(self._file.num_row_groups):
            size = self._file.metadata.row_group(group).num_rows
            if number < stop and number + size > start:
                groups.append(group)
                skipped = number if skipped is None else skipped
            number += size
        number = skipped or 0
        names = self.schema.names if columns is None else list(columns)
        try:
            for batch in read_batches(self._uri, self._file, names, groups=groups, rows=BATCH_ROWS):
                here = batch.slice(
                    max(0, start - number), max(0, min(stop, number + batch.num_rows) - max(start, number))
                )
                yield from enumerate(here.to_pylist(), max(start, number))
                number += batch.num_rows
                if number >= stop:
                    return
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self._uri}: damaged Parquet file ({error})") from error


# ---------------------------------------------------------------- text


class _TextTable:
    """Text by lines. The first line is a header unless one of its cells is an address."""

    is_parquet = False

    def __init__(self, file: IO[bytes], uri: str) -> None:
        self._file, self._uri = file, uri
        self._gzipped = uri.lower().endswith(".gz")
        name = uri.lower().removesuffix(".gz")
        self._is_json = name.endswith((".jsonl", ".ndjson"))
        self._dialect: dict[str, Any] = {"delimiter": ",", "skipinitialspace": True}
        self._names: list[str] = []
        self._begin = 0  # offset of the first row in bytes
        self._digest = xxhash.xxh3_128()
        head = list(self._head())
        if not head:
            raise UserError(f"{uri}: the table is empty")
        if self._is_json:
            self._names = list(
                dict.fromkeys(key for number, line in enumerate(head, 1) for key in self._json(line, number))
            )
        else:
            self._sniff(head, tabbed=name.endswith(".tsv"))
        self.schema = pa.schema([(name, pa.string()) for name in self._names])

    def _head(self) -> Iterator[str]:
        with self._lines(0) as lines:
            for _, (text, end) in zip(range(SNIFFED_ROWS), lines, strict=False):
                if text.strip():
                    yield text
                if end > SPAN_BYTES:
                    return

    def _sniff(self, head: list[str], tabbed: bool) -> None:
        delimiter = "\t" if tabbed else max(",;\t|", key=head[0].count)
        if not tabbed and all(ADDRESS.match(line) for line in head) and not self._has_columns(head, delimiter):
            delimiter = "\0"  # only addresses, which may contain commas
        self._dialect["delimiter"] = delimiter
        fields = {line.rstrip("\r\n").count("\t") for line in head}
        if delimiter == "\0" or (delimiter == "\t" and len(fields) == 1):  # TSV is usually not quoted
            self._dialect["quoting"] = csv.QUOTE_NONE
        first = next(csv.reader(head, **self._dialect), [])
        if any(ADDRESS.match(cell) for cell in first):
            place = next(i for i, cell in enumerate(first) if ADDRESS.match(cell))
            others = ["caption"] if len(first) == 2 else [f"column_{i}" for i in range(1, len(first))]
            self._names = [*others[:place], "url", *others[place:]]
            return
        self._names = [name.strip() for name in first]
        with self._records(0) as records:
            self._begin = next(records)[1]

    @staticmethod
    def _has_columns(head: list[str], delimiter: str) -> bool:
        """Whether lines that start with addresses have several columns, the same number in each line."""
        return len({line.count(delimiter) for line in head}) == 1 and head[0].count(delimiter) > 0

    # ------------------------------------------------------------ lines and records

    @contextlib.contextmanager
    def _lines(self, start: int) -> Iterator[Iterator[tuple[str, int]]]:
        """(line, offset of its end) from a byte offset; for gzipped text, offsets count uncompressed bytes."""
        self._file.seek(0 if self._gzipped else start)
        file: Any = gzip.GzipFile(fileobj=self._file) if self._gzipped else io.BufferedReader(_Raw(self._file), 1 << 20)
        yield self._decoded(file, start)

    def _decoded(self, file: IO[bytes], offset: int) -> Iterator[tuple[str, int]]:
        try:
            if self._gzipped:
                file.seek(offset)  # decompresses what is before
            while line := file.readline(MAX_LINE):
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    raise UserError(f"{self._uri}: a line of more than {MAX_LINE:,} bytes at byte {offset:,}")
                text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
                offset += len(line)
                yield text, offset
        except UnicodeDecodeError as error:
            raise UserError(f"{self._uri}: not UTF-8 text at byte {offset:,} ({error}); save it as UTF-8") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self._uri}: not a gzipped file, or damaged ({error})") from error

    @contextlib.contextmanager
    def _records(self, start: int) -> Iterator[Iterator[tuple[Any, int]]]:
        """(cells or line, offset of the end) of the records from a byte offset; a record may have several lines."""
        csv.field_size_limit(MAX_LINE)
        with self._lines(start) as lines:
            yield self._parsed(lines)

    def _parsed(self, lines: Iterator[tuple[str, int]]) -> Iterator[tuple[Any, int]]:
        if self._is_json:
            yield from ((text, end) for text, end in lines if text.strip())
            return
        end = 0

        def texts() -> Iterator[str]:
            nonlocal end
            for line in lines:
                end = line[1]
                yield line[0]

        try:
            for cells in csv.reader(texts(), **self._dialect):
                if cells:
                    yield cells, end
        except csv.Error as error:
            raise UserError(f"{self._uri}: cannot be read before byte {end:,} ({error})") from error

    def _values(self, record: Any, number: int) -> dict[str, Any]:
        if self._is_json:
            return dict.fromkeys(self._names) | self._json(record, number + 1)
        cells = [_unquoted(cell) for cell in record] if "quoting" in self._dialect else record
        return dict.fromkeys(self._names) | dict(zip(self._names, cells, strict=False))

    def _json(self, line: str, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self._uri}: row {number} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f"{self._uri}: row {number} is not an object of columns and values")
        return value

    # ------------------------------------------------------------ the table

    def first_rows(self) -> list[dict[str, Any]]:
        with self._records(self._begin) as records:
            found = []
            for number, (record, end) in zip(range(SNIFFED_ROWS), records, strict=False):
                found.append(self._values(record, number))
                if end > SPAN_BYTES:
                    break
            return found

    def columns(self, names: Sequence[str]) -> Iterator[pa.Array]:
        rows = self.first_rows()
        for name in names:
            yield pa.array([None if row[name] is None else str(row[name]) for row in rows], pa.string())

    def stamp(self, column: str) -> str:
        return self._digest.hexdigest()

    def batches(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return iter(())

    def spans(self) -> Iterator[Span]:
        with self._records(self._begin) as records:
            rows: list[Any] = []
            number, start, most = 0, self._begin, SPAN_ROWS[0]
            for record, end in records:
                rows.append(record)
                self._digest.update((record if self._is_json else "\x1f".join([*record, "\n"])).encode())
                if number + len(rows) == SPAN_ROWS[0]:  # estimate the number of rows from the length of the first rows
                    most = _span_rows(SPAN_ROWS[0] * storage.file_size(self._uri) // max(1, end))
                if len(rows) >= most or end - start >= SPAN_BYTES:
                    yield self._span(rows, number, start, end)
                    number, start, rows = number + len(rows), end, []
            if rows:
                yield self._span(rows, number, start, end)

    def _span(self, rows: list[Any], number: int, start: int, end: int) -> Span:
        return Span(number, len(rows), start, end, map(self._values, rows, range(number, number + len(rows))))

    def rows(
        self, start: int, stop: int, first: int, columns: Sequence[str] | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        with self._records(start) as records:
            for number, (record, end) in enumerate(records, first):
                if end > stop:
                    return
                yield number, self._values(record, number)


def _unquoted(cell: str) -> str:
    """A cell of TSV without the quotes that pandas puts around a cell with quotes in it."""
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '""' in cell:
        return cell[1:-1].replace('""', '"')
    return cell


class _Raw(io.RawIOBase):
    """A file of `storage` with its own buffer, which may be dropped without closing the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._below = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._below.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
