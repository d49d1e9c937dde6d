"""Parses row groups: a minimal reader for the Parquet pages that `writer` writes.

Not based on a library because this is the inner loop of the loader: it needs no footer, does not copy images, and
returns patches as views of the mapped file."""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.format.constants import UNLABELLED
from pipeline.data.format.manifest import Label, Schema
from pipeline.data.varint import read_varint
from pipeline.errors import plural


class RowGroup(NamedTuple):
    """A decoded row group. `labels`: int32 (rows,), or a list of int lists for multi-label. `images`: a list of byte
    views (jpeg), or a uint8 view (rows, N, P*P*C) of the buffer (patches)."""

    keys: list[str]
    labels: Any
    widths: np.ndarray
    heights: np.ndarray
    images: Any

    def rows(self) -> Iterator[tuple[str, Any, Label, int, int]]:
        """(key, image, label, width, height) of each row, the arguments of `ShardWriter.write`."""
        labels = self.labels if isinstance(self.labels, list) else self.labels.tolist()
        yield from zip(self.keys, self.images, labels, self.widths.tolist(), self.heights.tolist(), strict=True)


def parse_row_group(buffer: bytes | memoryview, rows: int, split: int, schema: Schema, images: bool = True) -> RowGroup:
    """Parses a row group of `rows` rows, whose image values start at offset `split`. With images=False, the buffer may
    end at `split`.

    Raises ValueError, IndexError, OverflowError or struct.error for invalid bytes, and ValueError for a label outside
    the classes."""
    view = memoryview(buffer)
    position, columns = 0, []
    for _ in range(4):  # key, label, width, height
        position, length = locate_page(view, position)
        columns.append(view[position : position + length])
        position += length
    keys = [str(value, "utf-8") for value in _byte_arrays(columns[0], rows)]
    widths, heights = (np.frombuffer(column, np.int32, rows) for column in columns[2:])
    labels: Any
    if schema.multilabel:
        labels, flat = _lists(columns[1], rows)
    else:
        labels = flat = np.frombuffer(columns[1], np.int32, rows)
    if len(flat) and not UNLABELLED <= flat.min() <= flat.max() < len(schema.classes):
        worst = flat.max() if flat.max() >= len(schema.classes) else flat.min()
        raise ValueError(f"label {worst} is outside the {plural(len(schema.classes), 'class')}")
    if not images:
        return RowGroup(keys, labels, widths, heights, None)
    values = view[split:]
    if schema.encoding == "jpeg":
        return RowGroup(keys, labels, widths, heights, _byte_arrays(values, rows))
    patches = np.frombuffer(values, np.uint8).reshape(rows, schema.tokens, schema.token_bytes)
    return RowGroup(keys, labels, widths, heights, patches)


def locate_page(view: memoryview, position: int) -> tuple[int, int]:
    """(start, length) of the values of the page with its header at `position`.

    The header is Parquet's PageHeader in Thrift's compact protocol: (1) type, (2) uncompressed size, (3) compressed
    size, (5) data page header, a struct of integers; each field is a byte (id delta << 4 | type) and a value.
    """
    size, last, depth = 0, [0], 1
    while depth:
        head = view[position]
        position += 1
        if head == 0:  # end of struct
            last.pop()
            depth -= 1
            continue
        last[-1] += head >> 4
        kind = head & 0x0F
        if kind == 12:  # struct
            last.append(0)
            depth += 1
        elif kind in (4, 5, 6):  # zigzag integers
            value, position = read_varint(view, position)
            if depth == 1 and last[0] == 3:
                size = value >> 1
        elif kind not in (1, 2):  # booleans have no value byte
            raise ValueError("not a plain data page")
    return position, size


def _byte_arrays(view: memoryview, rows: int) -> list[memoryview]:
    """Parquet's PLAIN byte arrays: a little-endian uint32 length before each value."""
    values, position, length = [], 0, struct.Struct("<I").unpack_from
    for _ in range(rows):
        start = position + 4
        position = start + length(view, position)[0]
        values.append(view[start:position])
    if position > len(view):
        raise ValueError("the values end early")
    return values


def _levels(view: memoryview, most: int) -> tuple[np.ndarray, int]:
    """Repetition or definition levels of maximum 1 (Parquet's RLE / bit-packed hybrid) and the bytes they take.

    A run contains its length. A length above `most` indicates damage and is rejected, because it could exhaust memory.
    """
    end = 4 + struct.unpack_from("<I", view, 0)[0]
    position, runs = 4, []
    while position < end:
        header, position = read_varint(view, position)
        if header >> 1 > most:
            raise ValueError(f"{header >> 1} levels")
        if header & 1:  # bit-packed groups of eight
            size = header >> 1
            runs.append(np.unpackbits(np.frombuffer(view, np.uint8, size, position), bitorder="little"))
            position += size
        else:
            runs.append(np.full(header >> 1, view[position], np.uint8))
            position += 1
    return np.concatenate(runs), end


def _lists(view: memoryview, rows: int) -> tuple[list[list[int]], np.ndarray]:
    """A required list<required int32> column, as lists and as a flat array. Repetition level 0 starts a row; definition
    level 0 is an empty list."""
    most = rows + len(view)  # a value has four bytes, an empty list none
    repeats, used = _levels(view, most)
    defined, more = _levels(view[used:], most)
    flat = np.frombuffer(view[used + more :], np.int32)
    values = flat.tolist()
    values.reverse()
    lists: list[list[int]] = []
    for repeat, present in zip(repeats.tolist(), defined.tolist(), strict=False):
        if not repeat:
            if len(lists) == rows:
                break  # bit-packed runs are padded to a multiple of eight
            lists.append([])
        if present:
            lists[-1].append(values.pop())
    if len(lists) < rows:
        raise ValueError("the labels end early")
    return lists, flat
