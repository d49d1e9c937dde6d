"""Label tables: CSV, TSV, JSON, JSONL and Parquet files of file names and labels, and ImageNet's devkit."""

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import UserError, nearest

FILE_COLUMNS = ("file_name", "filename", "file", "path", "image_path", "image", "key", "image_id", "id", "name")
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
)
SEPARATORS = re.compile(r"[;|]")  # between the labels of a column named in the plural


def read_label_table(uri: str) -> tuple[dict[str, list[str]], bool]:
    """{file name: labels} and whether it is multi-label, from a CSV, JSONL, JSON or Parquet table, or ImageNet's devkit.

    The label column is multi-label when it holds lists, when it is named in the plural and separates by ; or |, or when a
    file stands on several lines with different labels: it has all of them.
    """
    name = uri.lower()
    if "devkit" in name and name.endswith((".tar", ".tar.gz", ".tgz")):
        return _imagenet_devkit(uri), False
    try:
        if name.endswith((".csv", ".tsv")):
            text = read_text(uri)
            head = text.partition("\n")[0]
            delimiter = max(",;\t", key=head.count)  # the first of them when none is there
            rows: list[Any] = list(
                csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
            )
        elif name.endswith(".jsonl") or name.endswith(".ndjson"):
            rows = [json.loads(line) for line in read_text(uri).splitlines() if line.strip()]
        elif name.endswith(".json"):
            value = json.loads(read_text(uri))
            rows = [{"file": k, "label": v} for k, v in value.items()] if isinstance(value, dict) else value
        elif name.endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
        else:
            raise UserError(f"{uri}: labels are read from .csv, .tsv, .jsonl, .json or .parquet")
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{uri}: cannot read the label table ({error})") from error
    if not rows or not isinstance(rows, list):
        raise UserError(f"{uri}: the label table has no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{uri}: row {number} of the label table is no object of file name and label, but {row!r:.80}"
            )
    columns = list(dict.fromkeys(column for row in rows for column in row))  # JSON leaves out what a row has not
    file_column = _column(columns, FILE_COLUMNS, uri, "a file name")
    label_column = _column([c for c in columns if c != file_column], LABEL_COLUMNS, uri, "a label")
    for number, row in enumerate(rows, 1):
        if row.get(file_column) in (None, ""):
            raise UserError(
                f"{uri}: row {number} of the label table has no {file_column}; give it one or remove the row"
            )
    values = [row.get(label_column) for row in rows]
    plural = label_column.lower() in ("labels", "classes")
    multilabel = any(isinstance(v, list) or (plural and isinstance(v, str) and SEPARATORS.search(v)) for v in values)
    table: dict[str, list[str]] = {}
    for row, value in zip(rows, values, strict=True):
        labels = label_names(value, multilabel)
        if labels is not None:
            known = table.setdefault(str(row[file_column]).removeprefix("./"), labels)
            if known is not labels and known != labels:
                multilabel = True
                known.extend(label for label in labels if label not in known)
    return table, multilabel


def _column(columns: Iterable[str], known: Sequence[str], uri: str, what: str) -> str:
    lower = {str(column).lower(): column for column in columns}
    for name in known:
        if name in lower:
            return lower[name]
    found = ", ".join(map(str, columns))
    raise UserError(
        f"{uri}: no column with {what} among: {found}{nearest(next(iter(lower), ''), known)}; name it one of {', '.join(known)}"
    )


def label_names(value: Any, multilabel: bool) -> list[str] | None:
    """A raw label (int, text, list, missing) as names."""
    if value is None or (value == "" and not multilabel):
        return None
    if isinstance(value, (list, tuple, np.ndarray)):
        return [str(v) for v in value]
    if multilabel and isinstance(value, str):
        return [part.strip() for part in SEPARATORS.split(value) if part.strip()]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return [str(value).strip()]


def _imagenet_devkit(uri: str) -> dict[str, list[str]]:
    """Validation labels of ILSVRC2012_devkit_t12.tar.gz as {file name: [WordNet id]}."""
    import scipy.io

    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(uri))) as archive:
        files = {os.path.basename(member.name): member for member in archive if member.isfile()}
        try:
            meta = archive.extractfile(files["meta.mat"])
            truth = archive.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
        except KeyError as error:
            raise UserError(f"{uri}: not ImageNet's devkit, {error} is missing") from error
        assert meta is not None
        assert truth is not None
        synsets = scipy.io.loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        wordnet = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        ids = truth.read().split()
    return {f"ILSVRC2012_val_{i:08d}.JPEG": [wordnet[int(label)]] for i, label in enumerate(ids, 1)}


def lookup(table: dict[str, list[str]], path: str) -> list[str] | None:
    """A file's labels by relative path, base name, or either without extension."""
    base = path.rpartition("/")[2]
    for name in (path, base, os.path.splitext(path)[0], os.path.splitext(base)[0]):
        if name in table:
            return table[name]
    return None


def read_text(uri: str) -> str:
    try:
        return storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{uri}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{uri}: not UTF-8 text ({error})") from error
