"""Columnar files (Parquet and Arrow): finds the columns of image, label, split and key, and converts rows to items."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipeline import credentials
from pipeline.data.codecs import Refused
from pipeline.data.sources.columns import (
    PLURAL,
    SEPARATORS,
    Columns,
    label_names,
    name_in_object,
    named_column,
    normalised_name,
    unnamed_object,
)
from pipeline.data.sources.items import Item, Source
from pipeline.data.sources.layout import partition_value
from pipeline.data.sources.rows import parse_list
from pipeline.data.sources.split_columns import split_column, split_name, with_unnamed
from pipeline.data.sources.words import FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS
from pipeline.errors import UserError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "image_bytes", "bytes", "content")


class RowColumns:
    """The columns of a schema that hold the image, the label, the split and the key.

    `distinct(column)` returns the distinct values of a column; it is called if the column's name is ambiguous. Raises
    UserError for a schema without image bytes, or without a column that the user named.
    """

    def __init__(
        self, schema: pa.Schema, where: str, path: str, named: Columns, distinct: Any = None, image: str | None = None
    ) -> None:
        """image: the column that stands for the image when that is not one of bytes."""
        self.schema = schema
        self.image = image or image_column(schema, where)
        self.partitions = _partitions(path)
        names = [name for name in schema.names if name != self.image]
        wanted = named.label
        self.one_hot: list[str] = []
        if wanted and wanted not in names and "," in wanted:
            self.one_hot = [named_column(names, (), part.strip(), "--label-column") or "" for part in wanted.split(",")]
            wanted = None
        try:
            in_files = None if wanted in self.partitions or self.one_hot else wanted
            self.label = None if self.one_hot else named_column(names, LABEL_COLUMNS, in_files, "--label-column")
            self.split = split_column(
                names,
                None if named.split in self.partitions else named.split,
                distinct or (lambda _: ()),
                [f.name for f in schema if f.name in names and is_text(f.type) and not _holds_bytes(f.type)],
                named.label,
            )
        except UserError as error:  # or StorageError, of `distinct`
            raise type(error)(f"{where}: {error}") from error
        if wanted in self.partitions:
            self.label = None
        texts = {normalised_name(f.name): f.name for f in schema if f.name != self.image and is_text(f.type)}
        # a column "name" may hold file names or class names
        candidates = [] if image else [texts[n] for n in FILE_COLUMNS if n in texts and n != "name"]
        own = [named.file] if named.file in names else []
        self.key = next((name for name in (*own, *candidates) if name != self.label), None)
        columns = (self.key, self.image, self.label, self.split, *self.one_hot)
        self.all = list(dict.fromkeys(column for column in columns if column))
        self.label_of_file = _partition(self.partitions, named.label, LABEL_COLUMNS)
        self.split_of_file = _partition(self.partitions, named.split, SPLIT_COLUMNS)

    def labels(self, values: dict[str, Any]) -> list[str] | None:
        """The label names of a row."""
        if self.one_hot:
            return [name for name in self.one_hot if str(values[name]).lower() in ("1", "1.0", "true")]
        if self.label:
            return cell_labels(values[self.label], self.label)
        return None if self.label_of_file is None else [self.label_of_file]

    def item(
        self, values: dict[str, Any], name: str, row: int, source: Source, labels_of_file: Sequence[str] | None
    ) -> Item:
        """The item of row number `row` of the file `name`. A row without a label takes `labels_of_file`."""
        data, where, path = values[self.image], f"{name}#{row}", None
        own = values[self.key] if self.key else None
        if isinstance(own, bytes):
            own = own.decode("utf-8", "backslashreplace")
        key = f"{name}/{credentials.redacted(str(own))}" if own else where
        if isinstance(data, dict):
            if not own and data.get("path"):  # Hugging Face drops the folders, so names may repeat
                own = data["path"]
                key = f"{where}/{own}"
            path, data = data.get("path"), data.get("bytes")
        table = source.naming.table
        labels = table.lookup(str(own)) if table.labels and own else self.labels(values)
        if labels is None and labels_of_file:
            labels = list(labels_of_file)
        split = table.splits.get(table.find(str(own)) or "") if table.splits and own else None
        if self.split and not split:
            split = split_name(values[self.split], self.split)
        split = split or self.split_of_file
        if data is None and path:
            advice = "embed the images, or give the table with --labels and the folder of images with --source"
            return Item(key, where, b"", labels, Refused("path without bytes", f"{path}; {advice}"), split)
        if data is None:
            return Item(key, where, b"", labels, Refused("empty", "no bytes in the row"), split)
        return Item(key, where, bytes(data), labels, split=split)

    def names_and_splits(self, batch: pa.RecordBatch) -> tuple[set[str], set[str], bool]:
        """(label names, splits with "" for rows without one, whether a row has more or fewer labels than one) of a batch
        of label and split columns."""
        names, many = set(self.one_hot), False
        if self.one_hot:
            many = any(len(self.labels(row) or ()) != 1 for row in batch.select(self.one_hot).to_pylist())
        if self.label:
            for value in distinct_values(batch.column(self.label)):
                found = cell_labels(value, self.label)
                many |= found is not None and len(found) > 1
                names.update(found or ())
        splits = distinct_values(batch.column(self.split)) if self.split else ()
        return names, with_unnamed(split_name(value, self.split or "") for value in splits), many

    @property
    def label_columns(self) -> list[str]:
        """The columns that `names_and_splits` needs."""
        return list(dict.fromkeys(column for column in (self.label, self.split, *self.one_hot) if column))

    @property
    def multilabel(self) -> bool:
        """Whether the type of the label column is a list."""
        return self.label is not None and is_list(self.schema.field(self.label).type)

    @property
    def fields(self) -> set[str]:
        """The columns that were searched for a label; empty if a label was found."""
        found = self.label or self.one_hot or self.label_of_file
        return (
            set() if found else {name for name in self.schema.names if name not in (self.image, self.key, self.split)}
        )


def cell_labels(value: Any, column: str) -> list[str] | None:
    """The label names in one cell: a list, a list written as text, or text
    separated by ; or | in a column with a plural name."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    value = name_in_object(parse_list(value))
    if isinstance(value, dict):
        raise unnamed_object(column, value)
    return label_names(value, SEPARATORS if PLURAL.search(column) else None)


def distinct_values(column: pa.Array) -> Iterable[Any]:
    """The distinct values of a column; for a column of lists, the distinct lists."""
    if pa.types.is_struct(column.type) or (is_list(column.type) and pa.types.is_nested(column.type.value_type)):
        return list({repr(value): value for value in column.to_pylist()}.values())
    if is_list(column.type):
        return [list(value) for value in {tuple(value) for value in column.to_pylist() if value is not None}]
    if pa.types.is_string_view(column.type):  # Arrow does not implement `unique` for this type
        column = column.cast(pa.large_string())
    return column.unique().to_pylist()


MAX_DISTINCT_VALUES = 100
"""Number of distinct values that suffice to recognise the kind of a column."""


def first_values(columns: Iterable[pa.Array]) -> set[Any]:
    """The distinct values of a column that arrives in batches; reading stops after more than MAX_DISTINCT_VALUES values."""
    found: set[Any] = set()
    for column in columns:
        found.update(value for value in distinct_values(column) if not isinstance(value, list))
        if len(found) > MAX_DISTINCT_VALUES:
            break
    return found


def _partitions(path: str) -> dict[str, str]:
    """The Hive partitions in a path: label=cat/part-0.parquet -> {"label": "label=cat"}."""
    return {folder.partition("=")[0]: folder for folder in path.split("/")[:-1] if "=" in folder}


def _partition(partitions: dict[str, str], wanted: str | None, known: tuple[str, ...]) -> str | None:
    column = wanted if wanted in partitions else next((name for name in partitions if name.lower() in known), None)
    return None if column is None else partition_value(partitions[column], (column.lower(),))


def huggingface_names(schema: pa.Schema, label: str | None) -> list[str]:
    """Class names in index order from the Hugging Face metadata; empty if the metadata has none."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        if isinstance(feature, list):  # multi-label; newer versions write a feature of type List or Sequence
            feature = feature[0]
        names = feature["feature"]["names"] if "feature" in feature else feature["names"]
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        return []


def image_column(schema: pa.Schema, where: str) -> str:
    candidates = [f.name for f in schema if _holds_bytes(f.type)]
    lower = {name.lower(): name for name in reversed(candidates)}
    for name in (*IMAGE_COLUMNS, *(c for c in lower if c not in (*LABEL_COLUMNS, *FILE_COLUMNS, *SPLIT_COLUMNS))):
        if name in lower:
            return lower[name]
    found = ", ".join(f"{f.name}: {f.type}" for f in schema)
    raise UserError(
        f"{where}: no column of image bytes (binary, or a struct with bytes) among {found}; for a table of file names, "
        "pass the table with --labels and the folder of images with --source"
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a type is binary, a list of bytes, or Hugging Face's struct with bytes."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if is_list(kind):
        return kind.value_type == pa.uint8()
    return any(
        test(kind)
        for test in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
            pa.types.is_fixed_size_binary,
        )
    )


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    )


def is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
