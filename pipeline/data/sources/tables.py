"""Label tables: files that say which image has which label, and perhaps which split it belongs to.

CSV, TSV, text with or without a header, JSON, JSONL, Parquet, Kaggle's LOC_*_solution.csv, Caffe's "path label" lists,
Tiny-ImageNet's val_annotations.txt and ImageNet's devkit. Every reader gives rows; `_labelled` turns rows into a LabelTable.
"""

import ast
import csv
import io
import json
import math
import os
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.codecs import is_image_name
from pipeline.errors import UserError, nearest

# In order of preference, without regard to case.
FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "path",
    "image_path",
    "filepath",
    "image",
    "key",
    "image_id",
    "imageid",
    "id",
    "name",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "classes",
    "class_name",
    "labelname",
    "category",
    "target",
    "cls",
    "fine_label",
    "wnid",
    "synset",
    "predictionstring",
)
SPLIT_COLUMNS = ("split", "subset", "partition")
CAPTION_COLUMNS = frozenset({"text", "caption", "captions", "title", "prompt", "description", "alt", "alt_text"})
MISSING = frozenset({"", "nan", "NaN", "NAN", "<NA>", "null", "NULL", "N/A", "#N/A"})  # texts that stand for no label
SEPARATORS = re.compile(r"[;|]")  # between the labels of a column named in the plural
WHOLE_NUMBER = re.compile(r"-?\d+(\.0*)?")
SYNSET = re.compile(r"n\d{8}\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Columns that the user named, in tables and in Parquet sources."""

    file: str | None = None
    label: str | None = None
    split: str | None = None


class NoLabelColumn(UserError):
    """A table that names files but holds nothing known to be a label."""


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Labels and splits by file name. Names are relative paths, base names, or either without extension."""

    labels: dict[str, list[str]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    multilabel: bool = False

    def __bool__(self) -> bool:
        return bool(self.labels or self.splits)

    def find(self, path: str) -> str | None:
        """The row of a file, as a key of `labels` or `splits`.

        Exact names come first; then folders that only one side has are ignored, then case as well.
        """
        path = clean_path(path)
        suffixes = list(_suffixes(path))
        for name in (*suffixes, *(os.path.splitext(name)[0] for name in suffixes)):
            if name in self.labels or name in self.splits:
                return name
        stem = os.path.splitext(path)[0]
        loose = self._loose()
        found = (loose.get(name) for name in (path, stem, path.casefold(), stem.casefold()))
        return next((key for key in found if key is not None), None)

    def lookup(self, path: str) -> list[str] | None:
        """A file's label names."""
        key = self.find(path)
        return None if key is None else self.labels.get(key)

    def _loose(self) -> dict[str, str | None]:
        """Ends of keys with folders, as they are and without regard to case -> the key; None where two rows share one."""
        cached: dict[str, str | None] | None = self.__dict__.get("_loose_index")
        if cached is None:
            cached = {}
            for key in dict.fromkeys((*self.labels, *self.splits)):
                for name in _suffixes(key):
                    for variant in {name, name.casefold()}:
                        cached[variant] = key if cached.get(variant, key) == key else None
            self.__dict__["_loose_index"] = cached
        return cached

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_loose_index"}


def clean_path(path: str) -> str:
    """One spelling for the paths that tables of different systems hold: /, composed letters, no blanks around it."""
    path = unicodedata.normalize("NFC", path.strip().replace("\\", "/"))
    while path.startswith("./"):
        path = path[2:]
    return path


def _suffixes(path: str) -> Iterable[str]:
    """The path, and what is left of it when its first folders go, down to the base name."""
    parts = path.split("/")
    return ("/".join(parts[first:]) for first in range(len(parts)))


def read_label_table(uri: str, columns: Columns | None = None, need_labels: bool = True) -> LabelTable:
    """Reads a table of any known layout.

    The labels are multi-label when the column holds lists (or lists written as text), when it is named in the plural and
    separates by ; or |, when a file stands on several lines with different labels (it has all of them), or when one-hot
    columns have more or less than one 1 in a row. need_labels=False accepts a table without a label column.
    Raises UserError for a table that cannot be read, NoLabelColumn for one without a recognised label column.
    """
    columns = columns or Columns()
    name = uri.lower()
    if "devkit" in name and name.endswith((".tar", ".tar.gz", ".tgz")):
        return LabelTable(labels=_imagenet_devkit(uri))
    reader = next((read for ends, read in _READERS.items() if name.endswith(ends)), None)
    if reader is None:
        raise UserError(f"{uri}: labels are read from .csv, .tsv, .txt, .jsonl, .json or .parquet")
    try:
        rows = reader(uri, columns)
    except (ValueError, csv.Error, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot read the label table ({error})") from error
    if not rows or not isinstance(rows, list):
        raise UserError(f"{uri}: the label table has no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{uri}: row {number} of the label table is no object of file name and label, but {row!r:.80}"
            )
    return _labelled(rows, uri, columns, need_labels)


# ---------------------------------------------------------------- files -> rows


def _read_delimited(uri: str, columns: Columns) -> list[Any]:
    """Rows of CSV, TSV or plain text. Without a header the first column is the file and the second the label."""
    text = read_text(uri)
    lines = [line for line in text.splitlines() if line.strip()]
    head = lines[0] if lines else ""
    delimiter = max(",;\t", key=head.count)  # the first of them when none is there
    if not head.count(delimiter) and uri.lower().endswith(".txt"):  # Caffe: a path, which may hold blanks, and a label
        rows = [line.strip().rsplit(None, 1) for line in lines]
        return [dict(zip(("file_name", "label"), row, strict=False)) for row in rows]
    first = next(csv.reader([head], delimiter=delimiter, skipinitialspace=True), [])
    names = None if _is_header(first, columns) else [*("file_name", "label"), *(f"column {i}" for i in range(3, 99))]
    file = io.StringIO(text, newline="")
    return list(csv.DictReader(file, fieldnames=names, delimiter=delimiter, skipinitialspace=True))


def _is_header(first: Sequence[str], columns: Columns) -> bool:
    known = {*FILE_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS} | {c.lower() for c in (columns.file, columns.label) if c}
    return any(cell.strip().lower() in known for cell in first) or not any(map(is_image_name, first))


def _read_json_lines(uri: str, columns: Columns) -> list[Any]:
    return [json.loads(line) for line in read_text(uri).splitlines() if line.strip()]


def _read_json(uri: str, columns: Columns) -> Any:
    """A list of objects, an object {file: label}, or {"labels": [[file, label], ...]}."""
    value = json.loads(read_text(uri))
    if isinstance(value, dict) and set(value) == {"labels"} and isinstance(value["labels"], list):
        return [{"file": file, "label": label} for file, label in value["labels"]]
    return [{"file": k, "label": v} for k, v in value.items()] if isinstance(value, dict) else value


def _read_parquet(uri: str, columns: Columns) -> list[Any]:
    return pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()


_READERS: dict[tuple[str, ...], Callable[[str, Columns], Any]] = {
    (".csv", ".tsv", ".txt"): _read_delimited,
    (".jsonl", ".ndjson"): _read_json_lines,
    (".json",): _read_json,
    (".parquet",): _read_parquet,
}


# ---------------------------------------------------------------- rows -> labels


def _labelled(rows: list[dict[Any, Any]], uri: str, columns: Columns, need_labels: bool) -> LabelTable:
    names = [n for n in dict.fromkeys(name for row in rows for name in row) if isinstance(n, str)]
    file = named_column(names, FILE_COLUMNS, columns.file, "--file-column")
    if file is None:
        raise UserError(
            f"{uri}: no column with a file name among: {', '.join(names)}{nearest(names[0], FILE_COLUMNS)}; name it with "
            "--file-column"
        )
    split = named_column([n for n in names if n != file], SPLIT_COLUMNS, columns.split, "--split-column")
    rest = [n for n in names if n not in (file, split)]
    keys = []
    for number, row in enumerate(rows, 1):
        if row.get(file) in (None, ""):
            raise UserError(f"{uri}: row {number} of the label table has no {file}; give it one or remove the row")
        keys.append(clean_path(_text(row[file])))
    label = named_column(rest, LABEL_COLUMNS, columns.label, "--label-column")
    one_hot = [] if label else _one_hot(rows, rest)
    if label:
        values, multilabel = column_labels([row.get(label) for row in rows], label)
    elif one_hot:
        values = [[name for name in one_hot if float(row[name]) == 1] for row in rows]
        multilabel = any(value is None or len(value) != 1 for value in values)
    elif need_labels:
        raise NoLabelColumn(_no_label_column(uri, rows, rest))
    else:
        values, multilabel = [None] * len(rows), False
    table: dict[str, list[str]] = {}
    for key, labels in zip(keys, values, strict=True):
        if labels is not None:
            known = table.setdefault(key, labels)
            if known is not labels and known != labels:
                multilabel = True
                known.extend(name for name in labels if name not in known)
    splits = {}
    if split:
        found = {
            key: _text(row[split]).strip() for key, row in zip(keys, rows, strict=True) if not _missing(row[split])
        }
        splits = found if len(set(found.values())) > 1 or columns.split else {}
    return LabelTable(labels=table, splits=splits, multilabel=multilabel)


def named_column(names: Sequence[str], known: Sequence[str], wanted: str | None, flag: str) -> str | None:
    """The column the user named, else the first known name among `names`."""
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"{flag} {wanted}: no such column{nearest(wanted, names)}; there are: {', '.join(names)}")
        return wanted
    lower = {name.strip().lower(): name for name in names}
    return next((lower[name] for name in known if name in lower), None)


def _no_label_column(uri: str, rows: Sequence[dict[Any, Any]], names: Sequence[str]) -> str:
    """The message, with the column that looks most like a label: of few distinct values, none a caption."""
    distinct = {n: len({str(row.get(n)) for row in rows}) for n in names if n.lower() not in CAPTION_COLUMNS}
    guess = min((n for n in distinct if distinct[n] > 1), key=lambda n: distinct[n], default=None)
    advice = f"name it, perhaps with --label-column {guess}" if guess else "name it with --label-column"
    return f"{uri}: no column with a label among: {', '.join(names) or 'no other column'}; {advice}"


def _one_hot(rows: Sequence[dict[Any, Any]], names: Sequence[str]) -> list[str]:
    """The columns, when there are several and every value in them is 0 or 1."""
    for name in names:
        for row in rows:
            if str(row.get(name)).strip() not in ("0", "1", "0.0", "1.0"):
                return []
    return list(names) if len(names) > 1 else []


def column_labels(values: Sequence[Any], name: str) -> tuple[list[list[str] | None], bool]:
    """The label names of every value of a column called `name`, and whether it is multi-label."""
    plural = name.lower() in ("labels", "classes")
    if name.lower() == "predictionstring":  # Kaggle's ImageNet: a synset and four coordinates for each object
        found = [SYNSET.search(_text(value)) for value in values]
        return [[match[0]] if match else None for match in found], False
    values = [_parsed_list(value) for value in values]
    multilabel = any(isinstance(v, list) or (plural and isinstance(v, str) and SEPARATORS.search(v)) for v in values)
    if any(isinstance(v, list) for v in values) and not plural:
        multilabel = any(isinstance(v, list) and len(v) != 1 for v in values)
    labels = [label_names(value, multilabel) for value in values]
    texts = [name for names in labels for name in names or ()]
    if any("." in text for text in texts) and all(map(WHOLE_NUMBER.fullmatch, texts)):
        # pandas makes 2.0 of 2 as soon as one value of the column is missing
        labels = [names and [str(int(float(text))) for text in names] for names in labels]
    return labels, multilabel


def _parsed_list(value: Any) -> Any:
    """A list that was written as text, as a list."""
    if isinstance(value, np.ndarray | tuple):
        return list(value)
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        return parsed if isinstance(parsed, list) else value
    return value


def label_names(value: Any, multilabel: bool) -> list[str] | None:
    """A raw label (integer, text, bytes, list, missing) as names; None when it is missing."""
    if isinstance(value, list | tuple | np.ndarray):
        return [name for part in value for name in label_names(part, False) or ()]
    if multilabel and isinstance(value, str):
        return [part.strip() for part in SEPARATORS.split(value) if part.strip()]
    if _missing(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return [_text(value).strip()]


def _missing(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str | bytes) and _text(value).strip() in MISSING


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _imagenet_devkit(uri: str) -> dict[str, list[str]]:
    """Validation labels of ILSVRC2012_devkit_t12.tar.gz as {file name: [WordNet id]}."""
    import scipy.io  # takes 0.3 s

    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri))) as archive:
            files = {os.path.basename(member.name): member for member in archive if member.isfile()}
            meta = archive.extractfile(files["meta.mat"])
            truth = archive.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
            assert meta is not None
            assert truth is not None
            synsets = scipy.io.loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            wordnet = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
            ids = truth.read().split()
            return {f"ILSVRC2012_val_{i:08d}.JPEG": [wordnet[int(label)]] for i, label in enumerate(ids, 1)}
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    except KeyError as error:
        raise UserError(f"{uri}: not ImageNet's devkit, {error} is missing") from error
    except (tarfile.TarError, EOFError, OSError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{uri}: not ImageNet's devkit, or damaged ({error}); fetch it again") from error


def read_text(uri: str) -> str:
    try:
        return storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{uri}: not UTF-8 text ({error})") from error
