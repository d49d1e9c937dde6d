"""TFRecord files and tf.train.Example messages, read and written without TensorFlow.

A TFRecord file is a sequence of records: uint64 length, masked CRC-32C of those eight bytes, the data, masked CRC-32C of the
data, all little-endian. An Example is a protocol buffer that maps names to lists of bytes, float32 or int64. The parser
is written by hand: protobuf would need generated code and would copy each image once more.
"""

import gzip
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import google_crc32c
import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.codecs import Refused
from pipeline.data.sources import archives
from pipeline.data.sources.archives import FileScan
from pipeline.data.sources.columns import label_names
from pipeline.data.sources.items import FRAGMENTS, Item, ScanOptions, Source
from pipeline.data.sources.split_columns import split_name, split_of_fields
from pipeline.data.varint import read_varint
from pipeline.errors import UserError

NAME = "tfrecord"

SUFFIX = re.compile(
    r"(\.(tfrecords?|tfrec|record)(\.gz)?$|[.-]tfrecord(-\d+-of-\d+)?$|-\d{5}-of-\d{5}$)", re.IGNORECASE
)
LABEL_FEATURES = (  # in order of preference
    "image/class/synset",
    "image/class/text",
    "class",
    "label_name",
    "class_name",
    "image/class/label",
    "label",
    "labels",
    "category",
    "target",
)
# A longer record means a damaged length field or an attack on memory.
MAX_RECORD_BYTES = 1 << 30

# ---------------------------------------------------------------- records


def masked_checksum(data: bytes) -> int:
    """CRC-32C in TFRecord's masked form: rotated and offset, for data that itself contains checksums."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class DamagedRecord(UserError):
    """A TFRecord file is damaged. Failures of the store raise other errors."""


def read_records(file: IO[bytes], name: str, check: bool = True) -> Iterator[bytes]:
    """The records of an open TFRecord file. `check=False` skips the checksum of the data, but not that of the length.

    Raises DamagedRecord, which names `name` and the record, if the file is truncated or a checksum is wrong.
    """
    number = 0
    while head := file.read(12):
        where = f"{name}: record {number}"
        if len(head) < 12:
            raise DamagedRecord(f"{where}: the file is cut short inside a record's length; fetch it again")
        length, length_crc = struct.unpack("<QI", head)
        if masked_checksum(head[:8]) != length_crc:
            raise DamagedRecord(
                f"{where}: wrong checksum of the length; not a TFRecord file, or damaged (or compressed)"
            )
        if length > MAX_RECORD_BYTES:
            raise DamagedRecord(f"{where}: {length:,} bytes long, more than the limit of {MAX_RECORD_BYTES:,}")
        data, tail = file.read(length), file.read(4)
        if len(data) < length or len(tail) < 4:
            raise DamagedRecord(f"{where}: the file is cut short ({len(data):,} of {length:,} bytes); fetch it again")
        if check and masked_checksum(data) != struct.unpack("<I", tail)[0]:
            raise DamagedRecord(f"{where}: wrong checksum of the data; the file is damaged, fetch it again")
        yield data
        number += 1


def write_record(file: IO[bytes], data: bytes) -> None:
    head = struct.pack("<Q", len(data))
    file.write(head + struct.pack("<I", masked_checksum(head)) + data + struct.pack("<I", masked_checksum(data)))


# ---------------------------------------------------------------- tf.train.Example


def _fields(view: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value) of a message: ints for varints, memoryviews for everything else."""
    position = 0
    while position < len(view):
        tag, position = read_varint(view, position)
        kind = tag & 7
        if kind == 0:
            value, position = read_varint(view, position)
            yield tag >> 3, kind, value
            continue
        if kind == 2:
            size, position = read_varint(view, position)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position + size > len(view):
            raise ValueError("a field runs over the end")
        yield tag >> 3, kind, view[position : position + size]
        position += size


def _feature(view: memoryview) -> list[bytes] | np.ndarray:
    """A Feature message: list of bytes, float32 array or int64 array; repeated numbers may be packed or not."""
    for kind, _, values in _fields(view):
        if kind == 1:
            return [bytes(value) for _, _, value in _fields(values)]
        if kind == 2:
            return np.concatenate(
                [np.zeros(0, np.float32), *(np.frombuffer(v, "<f4") for _, _, v in _fields(values))], dtype=np.float32
            )
        if kind == 3:
            integers: list[int] = []
            for _, wire, value in _fields(values):
                if wire == 0:
                    integers.append(value)
                    continue
                position = 0
                while position < len(value):
                    integer, position = read_varint(value, position)
                    integers.append(integer)
            return np.array(integers, np.uint64).astype(np.int64)  # negative numbers are ten-byte two's complement
    return []


def parse_example(data: bytes, name: str = "record") -> dict[str, list[bytes] | np.ndarray]:
    """{feature name: values} of a serialised tf.train.Example; values are a list of bytes, a float32 array or an int64
    array.

    Raises UserError, which names `name`, for other bytes.
    """
    example: dict[str, list[bytes] | np.ndarray] = {}
    try:
        for number, _, features in _fields(memoryview(data)):
            for entry_number, _, entry in _fields(features) if number == 1 else ():
                if entry_number == 1:
                    parts = {field: value for field, _, value in _fields(entry)}
                    example[str(parts[1], "utf-8")] = _feature(parts.get(2, memoryview(b"")))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{name}: not a tf.train.Example message ({error})") from error
    return example


def _encode_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _message(number: int, data: bytes) -> bytes:
    return _encode_varint(number << 3 | 2) + _encode_varint(len(data)) + data


def encode_example(features: Mapping[str, bytes | str | Sequence | np.ndarray | int | float]) -> bytes:
    """Serialises a tf.train.Example: bytes and str (or lists of them) become bytes lists, floats become float lists,
    integers become int64 lists."""
    entries = b""
    for name, value in features.items():
        values: list[Any] = np.ravel(value).tolist() if not isinstance(value, bytes | str | list) else value  # type: ignore[assignment]
        values = [values] if isinstance(values, bytes | str) else list(values)
        if any(isinstance(v, bytes | str) for v in values):
            encoded = [v.encode() if isinstance(v, str) else v for v in values]
            feature = _message(1, b"".join(_message(1, v) for v in encoded))
        elif any(isinstance(v, float) for v in values):
            feature = _message(2, _message(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            feature = _message(3, _message(1, b"".join(map(_encode_varint, values))))
        entries += _message(1, _message(1, name.encode()) + _message(2, feature))
    return _message(1, entries)


# ---------------------------------------------------------------- a source of images


def matches(path: str) -> bool:
    return bool(SUFFIX.search(path))


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    return archives.scan_archives(NAME, uri, files, options, matches, scan_file)


def scan_file(uri: str, path: str, size: int, options: ScanOptions) -> FileScan:
    """One fragment per file. Label names need a pass over the file, which is skipped if labels are not needed."""
    found = FileScan(fragments=archives.whole_file(path, size))
    if not archives.names_wanted(options) and size <= 2 * options.unit_bytes and not options.columns.split:
        return found
    names: set[str] = set()
    splits: set[str] = set()
    source = Source(uri=uri, kind=NAME, fragments=FRAGMENTS.empty_table(), names=None, columns=options.columns)
    for item, fields in _read_file(uri, path, source):
        names.update(item.labels or ())
        splits.add(item.split or "")
        found.fields.update(fields)
        found.multilabel |= item.labels is not None and len(item.labels) > 1
        found.problem = found.problem or (item.refused.detail if item.refused else "")
    found.names, found.splits = sorted(names), sorted(splits) if any(splits) else ()
    return found


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    return archives.read_archives(
        source, fragments, lambda uri, name, _, source: (item for item, _ in _read_file(uri, name, source))
    )


def _read_file(uri: str, name: str, source: Source) -> Iterator[tuple[Item, Iterable[str]]]:
    """(item, names of the features) of each example."""
    row = 0
    try:
        for record in _records(uri):
            yield _item(record, name, row, source)
            row += 1
    except (DamagedRecord, EOFError, OSError, zlib.error) as error:
        yield Item(f"{name}#{row}", uri, b"", None, Refused("unreadable", f"the file is truncated: {error}")), ()


def _item(record: bytes, name: str, row: int, source: Source) -> tuple[Item, Iterable[str]]:
    where = f"{name}#{row}"
    try:
        example = parse_example(record)
    except UserError as error:
        return Item(where, where, b"", None, Refused("corrupt", str(error))), ()
    columns, table = source.columns, source.naming.table
    image = _first(example, "image/encoded", "image", "image_raw", "jpg", "jpeg", "png", "image_bytes")
    files = (columns.file,) if columns.file else ("image/filename", "filename", "file_name", "image/key/sha256", "key")
    own = _first(example, *files)
    own = own.decode("utf-8", "backslashreplace") if isinstance(own, bytes) else None
    names = table.lookup(own) if table.labels and own else _class_names(example, columns.label)
    split = table.splits.get(table.find(own) or "") if table.splits and own else None
    if split is None:
        value = _first(example, columns.split) if columns.split else None
        split = split_name(value, columns.split) if columns.split else _split_of_example(example)
    key = f"{name}/{own}" if own else where
    if not isinstance(image, bytes):
        return Item(key, where, b"", names, Refused("not an image", "no image bytes in the example"), split), example
    return Item(key, where, image, names, split=split), example


def _records(uri: str) -> Iterator[bytes]:
    with storage.open_file(uri) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        records: Any = gzip.GzipFile(fileobj=file) if packed else file
        yield from read_records(records, uri)


def _split_of_example(example: dict[str, Any]) -> str | None:
    short = {name: values for name, values in example.items() if len(values) == 1 and "/" not in name}
    return split_of_fields({name: _plain(values[0]) for name, values in short.items()})


def _class_names(example: dict[str, Any], wanted: str | None) -> list[str] | None:
    """The label names of an example, or its label numbers if it has no names; None without a label."""
    for feature in (wanted,) if wanted else LABEL_FEATURES:
        values = example.get(feature)
        if values is not None and len(values):
            found = [name for value in list(values) for name in label_names(_plain(value)) or ()]
            return found or None
    return None


def _plain(value: Any) -> Any:
    """Converts numpy scalars to Python numbers; other values are unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def _first(example: dict[str, Any], *names: str) -> Any:
    for name in names:
        values = example.get(name)
        if values is not None and len(values):
            return values[0]
    return None
