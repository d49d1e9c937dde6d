"""Parquet files: a column of image bytes (or Hugging Face's struct of bytes and path) and a label column."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives, items
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.columnar import RowColumns, first_values, huggingface_names, is_text
from pipeline.data.sources.items import Item, ScanOptions, Source
from pipeline.errors import UserError

NAME = "parquet"
BATCH_ROWS = 8  # rows that are decoded at a time; more are not faster
LABEL_BYTES = 64 << 20  # of labels that are decoded at a time
MAX_RATIO = 64  # maximum compression ratio; columns of images are below it


def matches(path: str) -> bool:
    return path.lower().endswith((".parquet", ".parq", ".pq"))


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    return archives.scan_archives(NAME, uri, files, options, matches, scan_file)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    """Fragments are runs of row groups of about `unit_bytes`. Label names come from
    the metadata, or else from the label column."""
    with OpenParquet(uri) as file:
        metadata, file_schema = file.metadata, file.schema_arrow
        columns = RowColumns(file_schema, uri, path, options.columns, lambda column: _distinct(uri, file, column))
        fragments: list[tuple[str, int, int, int, list[str] | None]] = []
        first, size = 0, 0
        for group in range(metadata.num_row_groups if metadata.num_rows else 0):
            size += metadata.row_group(group).total_byte_size
            if size >= options.unit_bytes or group == metadata.num_row_groups - 1:
                fragments.append((path, size, first, group + 1, None))
                first, size = group + 1, 0
        ordered = huggingface_names(file_schema, columns.label)
        found = FileScan(
            fragments=fragments, names=ordered, ordered_names=tuple(ordered), multilabel=columns.multilabel
        )
        names, splits = set(), set()
        wanted = archives.names_wanted(options) and not ordered
        reading = columns.label_columns if wanted else [columns.split] if columns.split else []
        for batch in _labels(uri, file, reading):
            labels, some, many = columns.names_and_splits(batch)
            names.update(labels)
            splits.update(some)
            found.multilabel |= many
    if columns.split_of_file:
        splits.add(columns.split_of_file)
    if wanted and not columns.label and columns.label_of_file:
        names = {columns.label_of_file}
    found.names, found.splits, found.fields = names or ordered, splits, columns.fields
    if wanted and columns.label and not options.columns.label and is_text(file_schema.field(columns.label).type):
        found.texts, found.text_samples, found.text_column = names, metadata.num_rows, columns.label
    return found


def _labels(uri: str, file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The values of label and split columns. Raises UserError for a column that unpacks to too many bytes."""
    for group in range(file.num_row_groups if columns else 0):
        largest, refused = _largest_value(file, group, columns)
        if refused:
            raise UserError(f"{uri}: {refused.detail}; this is not a column of labels")
        rows = max(1, LABEL_BYTES // largest) if largest else 1 << 16
        yield from file.iter_batches(columns=columns, row_groups=[group], batch_size=min(rows, 1 << 16))


def _distinct(uri: str, file: pq.ParquetFile, column: str) -> set[Any]:
    return first_values(batch.column(0) for batch in _labels(uri, file, [column]))


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(source, fragments, _read_fragment)


def _read_fragment(uri: str, name: str, fragment: dict[str, Any], source: Source) -> Iterator[Item]:
    with OpenParquet(uri) as file:
        columns = RowColumns(
            file.schema_arrow, uri, fragment["path"], source.columns, lambda column: _distinct(uri, file, column)
        )
        stop = file.num_row_groups if fragment["stop"] < 0 else fragment["stop"]
        row = sum(file.metadata.row_group(group).num_rows for group in range(fragment["start"]))
        for group in range(fragment["start"], stop):
            end = row + file.metadata.row_group(group).num_rows
            largest, refused = _largest_value(file, group, columns.all)
            if refused:
                yield Item(f"{name}#{row}", uri, b"", None, refused)
                row = end
                continue
            try:
                rows = 1 if largest else BATCH_ROWS
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns.all, use_threads=False):
                    for values in batch.to_pylist():
                        yield columns.item(values, name, row, source, fragment["labels"])
                        row += 1
            except (pa.ArrowException, OSError) as error:
                yield Item(f"{name}#{row}", uri, b"", None, Refused("unreadable", f"the file is truncated: {error}"))
                return


def _largest_value(file: pq.ParquetFile, group: int, columns: list[str]) -> tuple[int, Refused | None]:
    """(bytes that one value may have, why the row group is not read).

    All rows may refer to one value of the column's dictionary, so in a well compressed column a value may be as large as
    the column. 0: no column is well compressed."""
    largest = 0
    metadata = file.metadata.row_group(group)
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema.partition(".")[0] not in columns:
            continue
        size, packed = column.total_uncompressed_size, max(1, column.total_compressed_size)
        if size > max(items.MAX_FILE_BYTES, MAX_RATIO * packed):
            where = f"column {column.path_in_schema} of row group {group} with {metadata.num_rows:,} rows"
            return 0, Refused("too many bytes", f"{where}: {packed:,} bytes unpack to {size:,}")
        if size > 4 * packed:
            largest = max(largest, size)
    return largest, None


# ---------------------------------------------------------------- files


class OpenParquet:
    """An open Parquet file. A local file is memory-mapped: a Python file object would slow down Arrow's I/O threads.

    Raises StorageError if the store fails, UserError for other files and damaged ones.
    """

    def __init__(self, uri: str, buffer: int = 0) -> None:
        """buffer: bytes of a column that are read at a time; 0 reads the column of a row group at once."""
        self.uri, self.buffer = uri, buffer
        self._open = contextlib.ExitStack()

    def __enter__(self) -> pq.ParquetFile:
        try:
            if storage.is_remote(self.uri):
                file = self._open.enter_context(storage.open_file(self.uri))
                return pq.ParquetFile(file, pre_buffer=False, buffer_size=self.buffer)
            return pq.ParquetFile(self._open.enter_context(pa.memory_map(self.uri)), buffer_size=self.buffer)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.uri}: not a Parquet file, or damaged ({error})") from error

    def __exit__(self, *_: object) -> None:
        self._open.close()
