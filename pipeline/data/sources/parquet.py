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
from pipeline.data.sources.parquet_batches import largest_value, read_batches
from pipeline.errors import UserError

NAME = "parquet"
BATCH_ROWS = 8  # rows that are decoded at a time; more are not faster


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
        for batch in read_batches(uri, file, reading):
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


def _distinct(uri: str, file: pq.ParquetFile, column: str) -> set[Any]:
    return first_values(batch.column(0) for batch in read_batches(uri, file, [column]))


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
            largest, refused = largest_value(file, group, columns.all)
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
            storage.refuse_special(self.uri)
            return pq.ParquetFile(self._open.enter_context(pa.memory_map(self.uri)), buffer_size=self.buffer)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            self._open.close()
            raise UserError(f"{self.uri}: not a Parquet file, or damaged ({error})") from error

    def __exit__(self, *_: object) -> None:
        self._open.close()
