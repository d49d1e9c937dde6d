"""Parquet files: a column of image bytes (or Hugging Face's struct of bytes and path) and a label column."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.columnar import RowColumns, first_values, huggingface_names, is_text
from pipeline.data.sources.items import Item, ScanOptions, Source
from pipeline.errors import UserError

NAME = "parquet"
BATCH_ROWS = 64  # rows that are decoded at a time


def matches(path: str) -> bool:
    return path.lower().endswith((".parquet", ".parq", ".pq"))


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    return archives.scan_archives(NAME, uri, files, options, matches, scan_file)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    """Fragments are runs of row groups of about `unit_bytes`. Label names come from
    the metadata, or else from the label column."""
    with _ParquetFile(uri) as file:
        metadata, file_schema = file.metadata, file.schema_arrow
        columns = RowColumns(file_schema, uri, path, options.columns, lambda column: _distinct(file, column))
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
        reading = columns.labelling if wanted else [columns.split] if columns.split else []
        for batch in file.iter_batches(columns=reading, batch_size=1 << 16) if reading else ():
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


def _distinct(file: pq.ParquetFile, column: str) -> set[Any]:
    return first_values(batch.column(0) for batch in file.iter_batches(columns=[column], batch_size=1 << 16))


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(source, fragments, _read_fragment)


def _read_fragment(uri: str, name: str, fragment: dict[str, Any], source: Source) -> Iterator[Item]:
    with _ParquetFile(uri) as file:
        columns = RowColumns(
            file.schema_arrow, uri, fragment["path"], source.columns, lambda column: _distinct(file, column)
        )
        stop = file.num_row_groups if fragment["stop"] < 0 else fragment["stop"]
        row = sum(file.metadata.row_group(group).num_rows for group in range(fragment["start"]))
        groups = range(fragment["start"], stop)
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns.all, use_threads=False):
                for values in batch.to_pylist():
                    yield columns.item(values, name, row, source, fragment["labels"])
                    row += 1
        except (pa.ArrowException, OSError) as error:
            yield Item(f"{name}#{row}", uri, b"", None, Refused("unreadable", f"the file breaks off: {error}"))


# ---------------------------------------------------------------- files


class _ParquetFile:
    """An open Parquet file. A local file is memory-mapped: a Python file object would slow down Arrow's I/O threads.

    Raises StorageError if the store fails, UserError for other files and damaged ones.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._open = contextlib.ExitStack()

    def __enter__(self) -> pq.ParquetFile:
        try:
            if storage.is_remote(self.uri):
                return pq.ParquetFile(self._open.enter_context(storage.open_file(self.uri)), pre_buffer=False)
            return pq.ParquetFile(self._open.enter_context(pa.memory_map(self.uri)))
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.uri}: not a Parquet file, or damaged ({error})") from error

    def __exit__(self, *_: object) -> None:
        self._open.close()
