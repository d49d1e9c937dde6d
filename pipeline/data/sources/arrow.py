"""Arrow files (Hugging Face's `save_to_disk` and cache, Feather), with the same columns as Parquet files."""

import contextlib
import json
import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.columnar import RowColumns, first_values, huggingface_names, is_text
from pipeline.data.sources.items import Item, ScanOptions, Source
from pipeline.data.sources.listing import address_of
from pipeline.data.sources.parquet_batches import MAX_COLUMN_BYTES, MAX_RATIO
from pipeline.errors import UserError

NAME = "arrow"
MAGIC = b"ARROW1"  # begins the file format; the stream format has no such mark
DAMAGE = (pa.ArrowException, OSError, ValueError, struct.error)


def matches(path: str) -> bool:
    return path.lower().endswith((".arrow", ".feather", ".ipc"))


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    """Scans Arrow files. Raises UserError for a saved data set that selects rows through an indices file."""
    for path in files["path"].to_pylist():
        if path.rpartition("/")[2] == "state.json":
            with contextlib.suppress(ValueError, RecursionError, AttributeError):
                if json.loads(storage.read_bytes(address_of(uri, path))).get("_indices_data_files"):
                    raise UserError(
                        f"{uri}/{path}: the data set is a selection of rows kept in another file; save it again after "
                        "flatten_indices()"
                    )
    # Hugging Face's cache also holds the results of `map` and `filter`
    kept = [not path.rpartition("/")[2].startswith("cache-") for path in files["path"].to_pylist()]
    files = files.filter(pa.array(kept, pa.bool_()))
    return archives.scan_archives(NAME, uri, files, options, matches, scan_file)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    """One fragment per file. Label names come from the metadata, or else from a pass over the label column."""
    try:
        _refuse_bombs(uri)
        with _batches(uri) as (schema, batches):
            columns = RowColumns(schema, uri, path, options.columns, lambda column: _distinct(uri, column))
            ordered = huggingface_names(schema, columns.label)
            found = FileScan(fragments=archives.whole_file(path, size), names=ordered, ordered_names=tuple(ordered))
            found.multilabel, found.fields = columns.multilabel, columns.fields
            names: set[str] = set()
            splits = {columns.split_of_file} - {None}
            count = 0
            for batch in batches:
                count += batch.num_rows
                labels, some, many = columns.names_and_splits(batch)
                names.update(labels)
                splits.update(some)
                found.multilabel |= many
    except DAMAGE as error:
        raise UserError(f"{uri}: not an Arrow file, or damaged ({error})") from error
    if columns.label_of_file and not columns.label:
        names = {columns.label_of_file}
    found.names, found.splits = ordered or names, {split for split in splits if split is not None}
    if columns.label and not ordered and not options.columns.label and is_text(schema.field(columns.label).type):
        found.texts, found.text_samples, found.text_column = names, count, columns.label
    return found if count else FileScan(fragments=[])


def _distinct(uri: str, column: str) -> set[Any]:
    with _batches(uri) as (_, batches):
        return first_values(batch.column(column) for batch in batches)


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(source, fragments, _read_fragment)


def _read_fragment(uri: str, name: str, fragment: dict[str, Any], source: Source) -> Iterator[Item]:
    row = 0
    try:
        with _batches(uri) as (schema, batches):
            columns = RowColumns(schema, uri, fragment["path"], source.columns, lambda column: _distinct(uri, column))
            for batch in batches:
                for i in range(batch.num_rows):  # one by one: all rows may refer to one large value of a dictionary
                    (values,) = batch.slice(i, 1).select(columns.all).to_pylist()
                    yield columns.item(values, name, row, source, fragment["labels"])
                    row += 1
    except DAMAGE as error:
        yield Item(f"{name}#{row}", uri, b"", None, Refused("unreadable", f"the file is truncated: {error}"))


def _refuse_bombs(uri: str) -> None:
    """Raises UserError if a message unpacks to more than MAX_COLUMN_BYTES and to more than MAX_RATIO times its size. Arrow
    unpacks whole messages, and its interface tells their size only afterwards."""
    with _handle(uri) as handle:
        if handle.read(8)[: len(MAGIC)] != MAGIC:  # a file is its mark, a stream, and a table of contents
            handle.seek(0)
        for number, message in enumerate(pa.ipc.MessageReader.open_stream(handle)):
            size = sum(_unpacked_sizes(message))
            if size > max(MAX_COLUMN_BYTES, MAX_RATIO * message.body.size):
                raise UserError(f"{uri}: message {number} unpacks from {message.body.size:,} to {size:,} bytes")


def _unpacked_sizes(message: pa.ipc.Message) -> Iterator[int]:
    """Bytes of each compressed buffer after unpacking. Format: Arrow's Message.fbs; flatbuffers are little-endian, and each
    compressed buffer begins with its size (-1: not compressed)."""
    data, body = memoryview(message.metadata), memoryview(message.body)

    def number(kind: str, at: int) -> int:
        return struct.unpack_from("<" + kind, data, at)[0]

    def field(table: int, index: int) -> int:
        """Position of a table's field; 0 if it is absent."""
        entries = table - number("i", table)
        offset = number("H", entries + 4 + 2 * index) if 4 + 2 * index < number("H", entries) else 0
        return table + offset if offset else 0

    def follow(at: int) -> int:
        return at + number("I", at)

    header = field(follow(0), 2)
    if message.type not in ("record batch", "dictionary") or not header:
        return
    batch = follow(header)
    if message.type == "dictionary":
        batch = follow(field(batch, 1))
    buffers, compression = field(batch, 2), field(batch, 3)
    if not (buffers and compression):
        return
    first = follow(buffers)
    for i in range(number("I", first)):
        offset, length = (number("q", first + 4 + 16 * i + part) for part in (0, 8))
        if length >= 8:
            yield max(0, struct.unpack_from("<q", body, offset)[0])


@contextlib.contextmanager
def _handle(uri: str) -> Iterator[Any]:
    """The open file. A local file is memory-mapped."""
    with contextlib.ExitStack() as stack:
        if storage.is_remote(uri):
            yield pa.PythonFile(stack.enter_context(storage.open_file(uri)), "r")
        else:
            storage.refuse_special(uri)
            yield stack.enter_context(pa.memory_map(uri))


@contextlib.contextmanager
def _batches(uri: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """(schema, record batches) of an Arrow stream or file, read batch by batch."""
    with _handle(uri) as handle:
        is_file = handle.read(len(MAGIC)) == MAGIC
        handle.seek(0)
        if is_file:
            reader = pa.ipc.open_file(handle)
            yield reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            stream = pa.ipc.open_stream(handle)
            yield stream.schema, iter(stream)
