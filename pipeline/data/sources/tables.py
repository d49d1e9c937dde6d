"""Label tables: files that give the label of each image, and perhaps its split.

CSV, TSV, text with or without a header, JSON, JSONL, Parquet, Kaggle's LOC_*_solution.csv, Caffe's and MXNet's lists, COCO's
JSON, Tiny-ImageNet's val_annotations.txt and ImageNet's devkit. `rows` reads the files, `columns` recognises their
columns, and LabelTable finds the row of an image, however its path is spelled.
"""

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import xxhash

from pipeline.data.sources.columns import (
    Columns,
    NoLabelColumn,
    as_text,
    captions_error,
    label_values,
    look_like_captions,
    named_column,
    no_label_column,
)
from pipeline.data.sources.devkit import is_devkit, read_devkit
from pipeline.data.sources.rows import read_rows
from pipeline.data.sources.split_columns import SeveralFlags, split_column, split_name, split_of_flags
from pipeline.data.sources.words import FILE_COLUMNS, LABEL_COLUMNS
from pipeline.errors import UserError, nearest, plural, shorten

__all__ = ["Columns", "LabelTable", "NoLabelColumn", "clean_path", "read_label_table"]

logger = logging.getLogger(__name__)
NUMBERED = re.compile(r"(?a)(\d{1,18})(?:\.0+)?")
EXTENSION = re.compile(r"(?ai)\.(?:[a-z]{1,10}|(?=[0-9]*[a-z])[a-z0-9]{1,5})")  # a number, as in scan.0001, is none


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Labels and splits by file name. File names are relative paths or base names, with or without extension."""

    labels: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    multilabel: bool = False
    unlabelled: frozenset[str] = frozenset()
    """Files that the table lists without a label."""
    uri: str = ""
    of_splits: frozenset[str] = frozenset()
    """The splits that the table is about, in lower case, if its file is named after them; empty: all images."""
    whole_has_labels: bool | None = None
    """For some of the rows of a table: whether the table has labels."""

    @property
    def in_memory(self) -> bool:
        """Whether `find` and `keys` can be used."""
        return True

    def __bool__(self) -> bool:
        return bool(self.labels or self.splits) or self.whole_has_labels is not None

    @property
    def has_labels(self) -> bool:
        """Whether the labels come from this table; otherwise it has only splits."""
        return bool(self.labels) if self.whole_has_labels is None else self.whole_has_labels

    @property
    def named_splits(self) -> set[str]:
        """The splits of the rows, with "" if some rows with a label have none."""
        found = set(self.splits.values())
        return found | {""} if found and not self.labels.keys() <= self.splits.keys() else found

    def __contains__(self, key: str) -> bool:
        return key in self.labels or key in self.splits or key in self.unlabelled

    @property
    def keys(self) -> Iterable[str]:
        """The file names in the table."""
        return dict.fromkeys((*self.labels, *self.splits, *sorted(self.unlabelled)))

    def find(self, path: str) -> str | None:
        """The row of a file, as one of `keys`, or None.

        Exact names are tried first; then without folders that only one side has, then without the extension, then
        without regard to case, then as numbers (CSV readers turn 000123 into 123). A name that matches several rows, such as 0.jpg for a/0.jpg and b/0.jpg, matches none.
        """
        path = clean_path(path)
        suffixes = list(_suffixes(path))
        for name in (*suffixes, *map(without_extension, suffixes)):
            if name in self:
                return name
        stem = without_extension(path)
        loose = self._loose()
        found = [loose.get(name) for name in (path, stem, path.casefold(), stem.casefold())]
        if all(key is None for key in found):  # other case, and folders that the row has not
            whole = self._folded()
            names = (*map(str.casefold, suffixes), *(without_extension(name).casefold() for name in suffixes))
            found = [whole[name] for name in names if name in whole][:1]
        if all(key is None for key in found) and (number := numbered(stem)):
            whole, ends = self._numbers()
            found = [*(whole.get(name) for name in _suffixes(number)), ends.get(number)]
        return next((key for key in found if key is not None), None)

    def lookup(self, path: str) -> list[str] | None:
        """The label names of a file, or None."""
        key = self.find(path)
        return None if key is None else self.labels.get(key)

    def _loose(self) -> dict[str, str | None]:
        """{suffix of a key, in original and folded case, with and without extension:
        key}; None where two rows share a suffix."""
        cached: dict[str, str | None] | None = self.__dict__.get("_loose_index")
        if cached is None:
            cached = {}
            for key in self.keys:
                for name in _suffixes(key):
                    stem = without_extension(name)
                    for variant in {name, name.casefold(), stem, stem.casefold()}:
                        cached[variant] = key if cached.get(variant, key) == key else None
            self.__dict__["_loose_index"] = cached
        return cached

    def _folded(self) -> dict[str, str | None]:
        """{key in folded case, with and without extension: key}; None where two rows share one."""
        cached: dict[str, str | None] | None = self.__dict__.get("_folded_index")
        if cached is None:
            cached = {}
            for key in self.keys:
                for name in {key.casefold(), without_extension(key).casefold()}:
                    cached[name] = key if cached.get(name, key) == key else None
            self.__dict__["_folded_index"] = cached
        return cached

    def _numbers(self) -> tuple[dict[str, str | None], dict[str, str | None]]:
        """({`numbered` key: key}, {suffix of a `numbered` key: key}); None where two rows share one."""
        cached: tuple[dict[str, str | None], dict[str, str | None]] | None = self.__dict__.get("_number_index")
        if cached is None:
            cached = {}, {}
            for key in self.keys:
                if key == without_extension(key) and (number := numbered(key)):  # CSV readers do not change 0001.jpg
                    for index, names in zip(cached, ([number], _suffixes(number)), strict=True):
                        index.update({name: key if index.get(name, key) == key else None for name in names})
            self.__dict__["_number_index"] = cached
        return cached

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.endswith("_index")}


def clean_path(path: str) -> str:
    """Normalises a path from a table: forward slashes, composed Unicode, no surrounding blanks, no percent encoding."""
    path = unicodedata.normalize("NFC", path.strip().replace("\\", "/"))
    if "://" in path:
        path = path.partition("?")[0]  # a signed address
    if "%" in path:
        path = unquote(path)
    while path.startswith("./"):
        path = path[2:]
    return path


def without_extension(path: str) -> str:
    """The path without its extension. As in os.path.splitext, a name such as .jpg has none; this is three times as fast."""
    dot = path.rfind(".")
    if dot < 1 or not EXTENSION.fullmatch(path, dot):
        return path
    return path[:dot] if path[path.rfind("/", 0, dot) + 1 : dot].strip(".") else path


def numbered(stem: str) -> str | None:
    """The path with the base name 000123 or 123.0 as 123; None for other base names. stem: without extension."""
    folder, slash, name = stem.rpartition("/")
    match = NUMBERED.fullmatch(name)
    return f"{folder}{slash}{int(match[1])}" if match else None


def join_key(path: str) -> str:
    """A key that a file and its row have in common, for every spelling that `LabelTable.find` accepts: the base name
    in folded case, without extensions. path: a result of `clean_path`."""
    name = path.rpartition("/")[2].casefold()
    while (stem := without_extension(name)) != name:
        name = stem
    return numbered(name) or name


def file_hash(path: str) -> int:
    """64 bits that a file and its row have in common."""
    return xxhash.xxh3_64_intdigest(join_key(clean_path(path)).encode("utf-8", "backslashreplace"))


def _suffixes(path: str) -> Iterable[str]:
    """The path, then the path without its first folder, and so on down to the base name."""
    parts = path.split("/")
    return ("/".join(parts[first:]) for first in range(len(parts)))


def read_label_table(
    uri: str, columns: Columns | None = None, need_labels: bool = True, data: bytes | None = None
) -> LabelTable:
    """Reads a label table of any known layout. data: the contents, if they are not stored at `uri`.

    The table is multi-label if its label column holds lists (or lists written as text), if cells hold several names
    separated by ; or |, if a file has several rows with different labels, or if a row of one-hot columns does not have
    exactly one 1. A table without a label column is accepted if it has a split column, or with need_labels=False.
    Raises UserError for a table that cannot be read, NoLabelColumn for a table without a recognised label column.
    """
    columns = columns or Columns()
    if is_devkit(uri):
        return LabelTable(labels=read_devkit(uri))
    rows = read_rows(uri, (columns.file, columns.label, columns.split), data)
    names = [n for n in dict.fromkeys(name for row in rows for name in row) if isinstance(n, str)]
    file = file_column(uri, names, columns)
    others = [name for name in names if name != file]
    try:
        read, splits = _row_splits(rows, others, columns)
    except UserError as error:
        raise UserError(f"{uri}: {error}") from error
    keys = _row_keys(rows, file, uri)
    labels, multilabel = _row_labels(
        rows, [name for name in others if name not in read], columns, uri, need_labels and not read
    )
    if len(set(splits)) < 2 and not columns.split:
        splits = [None] * len(rows)
    return table_of_rows(uri, keys, labels, splits, multilabel)


def file_column(uri: str, names: Sequence[str], columns: Columns) -> str:
    """The column of file names. Raises UserError if there is none."""
    file = named_column(names, FILE_COLUMNS, columns.file, "--file-column")
    if file is None:
        raise UserError(
            f"{uri}: no column of file names among: {shorten(f'{name:.60}' for name in names)}{nearest(names[0], FILE_COLUMNS)}; name it with "
            "--file-column"
        )
    return file


def table_of_rows(
    uri: str,
    keys: Sequence[str],
    labels: Sequence[list[str] | None],
    splits: Sequence[str | None],
    multilabel: bool,
    whole_has_labels: bool | None = None,
) -> LabelTable:
    """The table of some rows; rows of the same file have all their labels. Changes the lists in `labels`."""
    table: dict[str, list[str]] = {}
    different: set[str] = set()  # files whose rows differ
    for key, found in zip(keys, labels, strict=True):
        if found is not None:
            known = table.setdefault(key, found)
            if known is not found and known != found:
                different.add(key)
                known.extend(name for name in found if name not in known)
    if different and not multilabel and whole_has_labels is None:
        logger.warning(
            "%s: %s with several rows of different labels, such as %s, so images have several labels", uri,
            plural(len(different), "file"), min(different),
        )  # fmt: skip
    return LabelTable(
        labels=table,
        splits={key: name for key, name in zip(keys, splits, strict=True) if name is not None},
        multilabel=multilabel or bool(different),
        unlabelled=frozenset(keys) - table.keys(),
        uri=uri,
        whole_has_labels=whole_has_labels,
    )


def _row_keys(rows: list[dict[Any, Any]], file: str, uri: str) -> list[str]:
    """The normalised file name of every row."""
    keys = []
    for number, row in enumerate(rows, 1):
        key = key_of(row.get(file))
        if key is None:
            raise no_key(uri, number, file)
        keys.append(key)
    return keys


def key_of(value: Any) -> str | None:
    """The normalised file name in a cell; None if the cell is empty."""
    if isinstance(value, dict):  # Hugging Face's struct of bytes and path
        value = value.get("path")
    if value is None or as_text(value).strip() == "" or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return clean_path(as_text(value))


def no_key(uri: str, number: int, file: str) -> UserError:
    return UserError(f"{uri}: row {number} of the label table has no {file}; fill it in or remove the row")


def _row_splits(rows: list[dict[Any, Any]], names: list[str], columns: Columns) -> tuple[list[str], list[str | None]]:
    """(the columns of the splits, the split of every row): of one column, or of several flags that never contradict one
    another. Raises UserError for flags that do."""
    try:
        found = split_column(names, columns.split, lambda name: [row.get(name) for row in rows], label=columns.label)
    except SeveralFlags as error:
        flags = list(error.columns)
        several = [split_of_flags({name: row.get(name) for name in flags}) for row in rows]
        if None in several:
            raise
        return flags, several
    return ([found], [split_name(row.get(found), found) for row in rows]) if found else ([], [None] * len(rows))


def _row_labels(
    rows: list[dict[Any, Any]], names: list[str], columns: Columns, uri: str, need_labels: bool
) -> tuple[list[list[str] | None], bool]:
    """(label names of every row, whether the table is multi-label)."""
    several = columns.label is not None and columns.label not in names and "," in columns.label
    label = (
        named_column(names, LABEL_COLUMNS, None if several else columns.label, "--label-column")
        if not several
        else None
    )
    try:
        found = label_values(rows, names, label, columns.label)
    except UserError as error:
        raise UserError(f"{uri}: {error}") from error
    if found is None or all(value is None for value in found[0]):
        if need_labels:
            others = [name for name in names if name != label]
            raise no_label_column(uri, others, {name: [row.get(name) for row in rows] for name in others})
        return [None] * len(rows), False
    distinct = {name for value in found[0] for name in value or ()}
    if need_labels and not columns.label and not found[1] and look_like_captions(distinct, len(rows)):
        raise captions_error(uri, distinct, len(rows), f"--label-column {label!r}")
    return found
