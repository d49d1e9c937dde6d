"""Parquet files: a column of image bytes (or Hugging Face's struct of bytes and path) and a label column."""

import json
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.items import Item, ScanOptions, Source
from pipeline.data.sources.tables import (
    FILE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_COLUMNS,
    Columns,
    LabelTable,
    label_names,
    named_column,
)
from pipeline.errors import UserError

NAME = "parquet"
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes", "content")
BATCH_ROWS = 64  # rows that are decoded at a time


def matches(path: str) -> bool:
    return path.endswith(".parquet")


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    return archives.scan_archives(NAME, uri, files, options, matches, scan_file)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    """Fragments are row groups, joined up to about `unit_bytes`; label names come from the metadata, else from the column."""
    with _ParquetFile(uri) as file:
        metadata, file_schema = file.metadata, file.schema_arrow
        columns = _Columns(file_schema, uri, options.columns)
        label = columns.label
        fragments: list[tuple[str, int, int, int, list[str] | None]] = []
        first, size = 0, 0
        for group in range(metadata.num_row_groups if metadata.num_rows else 0):
            size += metadata.row_group(group).total_byte_size
            if size >= options.unit_bytes or group == metadata.num_row_groups - 1:
                fragments.append((path, size, first, group + 1, None))
                first, size = group + 1, 0
        ordered = _huggingface_names(file_schema, label)
        many = label is not None and _is_list(file_schema.field(label).type)
        names: set[str] = set()
        if archives.names_wanted(options) and label and not ordered:
            names = _distinct_names(file, label, many)
        splits = _distinct_names(file, columns.split, False) if columns.split else set()
    partition = _partition_label(path)
    if partition and not label:
        names = {partition}
    return FileScan(
        fragments=fragments, names=names or ordered, ordered_names=tuple(ordered), multilabel=many, splits=splits
    )


def _partition_label(path: str) -> str | None:
    """The label that Hive's folders give to a file: label=cat/part-0.parquet."""
    for folder in path.split("/")[:-1]:
        column, equals, value = folder.partition("=")
        if equals and column.lower() in LABEL_COLUMNS:
            return unquote(value)
    return None


def _distinct_names(file: pq.ParquetFile, label: str, many: bool) -> set[str]:
    names: set[str] = set()
    for batch in file.iter_batches(columns=[label], batch_size=1 << 16):
        values = batch.column(0).flatten() if many else batch.column(0)
        if pa.types.is_string_view(values.type):  # Arrow has no `unique` for it
            values = values.cast(pa.large_string())
        names.update(name for v in values.unique().to_pylist() for name in label_names(v, False) or ())
    return names


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(source, fragments, _read_fragment)


def _read_fragment(uri: str, name: str, fragment: dict[str, Any], source: Source) -> Iterator[Item]:
    opened = _ParquetFile(uri)
    with opened as file:
        columns = _Columns(file.schema_arrow, uri, source.columns)
        partition = _partition_label(fragment["path"])
        stop = file.num_row_groups if fragment["stop"] < 0 else fragment["stop"]
        row = sum(file.metadata.row_group(group).num_rows for group in range(fragment["start"]))
        groups = range(fragment["start"], stop)
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns.all, use_threads=False):
                for values in batch.to_pylist():
                    item = columns.item(values, name, row, source.table)
                    yield item._replace(labels=[partition]) if partition and not columns.label else item
                    row += 1
        except (pa.ArrowException, OSError) as error:
            opened.check()
            yield Item(f"{name}#{row}", uri, b"", None, Refused("unreadable", f"the file breaks off: {error}"))


class _Columns:
    """Which columns hold the image, the label and the key."""

    def __init__(self, file_schema: pa.Schema, uri: str, named: Columns) -> None:
        self.image = _image_column(file_schema, uri)
        others = [name for name in file_schema.names if name != self.image]
        try:
            self.label = named_column(others, LABEL_COLUMNS, named.label, "--label-column")
            self.split = named_column(others, SPLIT_COLUMNS, named.split, "--split-column")
        except UserError as error:
            raise UserError(f"{uri}: {error}") from error
        texts = {f.name.lower(): f.name for f in file_schema if f.name != self.image and _is_text(f.type)}
        # "name" is as often that of the class
        candidates = [texts[n] for n in FILE_COLUMNS if n in texts and n != "name"]
        self.key = next((name for name in candidates if name != self.label), None)
        self.all = list(dict.fromkeys(column for column in (self.key, self.image, self.label, self.split) if column))

    def item(self, values: dict[str, Any], name: str, row: int, table: LabelTable) -> Item:
        data, where = values[self.image], f"{name}#{row}"
        own = values[self.key] if self.key else None
        key = f"{name}/{own}" if own else where
        if isinstance(data, dict):
            if not own and data.get("path"):  # Hugging Face drops the folders: other rows may have the same name
                own = data["path"]
                key = f"{where}/{own}"
            data = data.get("bytes")
        if isinstance(own, bytes):
            own = own.decode("utf-8", "backslashreplace")
        if table.labels and own:
            labels = table.lookup(own)
        else:
            labels = label_names(values[self.label], False) if self.label else None
        split = table.splits.get(table.find(own) or "") if table.splits and own else None
        if self.split and not split:
            split = next(iter(label_names(values[self.split], False) or ()), None)
        if data is None:
            return Item(key, where, b"", labels, Refused("empty", "no bytes in the row"), split)
        return Item(key, where, bytes(data), labels, split=split)


# ---------------------------------------------------------------- columns


def _image_column(file_schema: pa.Schema, uri: str) -> str:
    candidates = [f.name for f in file_schema if _holds_bytes(f.type)]
    lower = {name.lower(): name for name in reversed(candidates)}
    for name in (*IMAGE_COLUMNS, *(c for c in lower if c not in (*LABEL_COLUMNS, *FILE_COLUMNS, *SPLIT_COLUMNS))):
        if name in lower:
            return lower[name]
    found = ", ".join(f"{f.name}: {f.type}" for f in file_schema)
    raise UserError(f"{uri}: no column of image bytes (binary, or a struct with bytes) among {found}")


def _holds_bytes(kind: pa.DataType) -> bool:
    """Binary of any form, lists of bytes, and Hugging Face's struct."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_list(kind):
        return kind.value_type == pa.uint8()
    return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    )


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _huggingface_names(file_schema: pa.Schema, label: str | None) -> list[str]:
    """Class names in index order, where the Hugging Face metadata has them."""
    try:
        feature = json.loads(file_schema.metadata[b"huggingface"])["info"]["features"][label]
        if isinstance(feature, list):  # multi-label; newer: a feature of type List or Sequence
            feature = feature[0]
        return list(feature["feature"]["names"] if "feature" in feature else feature["names"])
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        return []


class _StoreFile:
    """A file on a store that remembers whether reading it failed: Arrow makes the same exceptions of that and of damage."""

    def __init__(self, handle: IO[bytes]) -> None:
        self.handle = handle
        self.problem: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self.handle.read(size)
        except Exception as error:  # botocore, aiohttp and the socket layer each have their own
            self.problem = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)


class _ParquetFile:
    """An open Parquet file. A local one goes to Arrow by path: a Python file object behind its I/O threads costs speed.

    Raises StorageError when the store fails, UserError for what is no Parquet file.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> pq.ParquetFile:
        self.handle: Any = None
        try:
            if storage.is_remote(self.uri):
                fs, path = storage.filesystem(self.uri)
                self.handle = _StoreFile(fs.open(path, "rb", block_size=16 << 20))
                return pq.ParquetFile(self.handle, pre_buffer=False)
            self.handle = pa.memory_map(self.uri)
            return pq.ParquetFile(self.handle)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            self.check()
            raise UserError(f"{self.uri}: not a Parquet file, or damaged ({error})") from error
        except Exception:
            self.check()
            raise

    def check(self) -> None:
        problem = getattr(self.handle, "problem", None)
        if problem is not None:
            raise storage.StorageError(
                f"{self.uri}: cannot be read ({problem}); run the same command again"
            ) from problem

    def __exit__(self, *_: object) -> None:
        self.handle.close()
        self.check()
