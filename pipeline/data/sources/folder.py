"""Folders of image files: the class is the first folder, or a label table says it."""

import fnmatch
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.images import Refused
from pipeline.data.sources import items, listing
from pipeline.data.sources.items import (
    IMAGE_NAMES,
    PIECES,
    Item,
    ScanOptions,
    Source,
    pieces_of_files,
    too_large,
)
from pipeline.data.sources.tables import lookup, read_label_table
from pipeline.errors import UserError

NAME = "folder"
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
TABLE_FILE = re.compile(r"(?i)(?:labels|metadata)\.(?:csv|tsv|jsonl|parquet)")  # found by themselves in a folder
REQUESTS = 64  # objects of a store that are fetched at a time
ATTEMPTS = 5


def matches(path: str) -> bool:
    """Image files, by the ends of their names."""
    return path.lower().endswith(tuple(f".{end}" for end in IMAGE_NAMES))


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    """Every file is a piece. Labels are those of a table (given, or found as labels.* or metadata.*), else the folders."""
    table, multilabel = options.table, options.multilabel
    if not table:
        beside = [path for path in files["path"].to_pylist() if TABLE_FILE.fullmatch(path)]
        if beside:
            table, multilabel = read_label_table(storage.join(uri, beside[0]))
            files = files.filter(pc.invert(pc.is_in(files["path"], pa.array(beside, pa.large_string()))))
    if options.include:
        keep = [fnmatch.fnmatch(options.prefix + path.as_py(), options.include) for path in files["path"]]
        files = files.filter(pa.array(keep, pa.bool_()))
        if not files.num_rows:
            raise UserError(f"{uri}: nothing matches --include {options.include!r}")
    pieces, names = _labelled_by_table(files, table) if table else _labelled_by_folder(uri, files)
    return Source(
        uri=uri,
        kind=NAME,
        prefix=options.prefix,
        pieces=pieces,
        names=frozenset(names),
        multilabel=multilabel,
        by_folder=not table,
    )


def _labelled_by_table(files: pa.Table, table: dict[str, list[str]]) -> tuple[pa.Table, set[str]]:
    """Pieces and label names. Files that only the table knows become pieces too, so that they are counted as missing."""
    paths = files["path"].to_pylist()
    labels = [lookup(table, path) for path in paths]
    known = {name for path in paths for name in (path, path.rpartition("/")[2])}
    known |= {os.path.splitext(name)[0] for name in known}
    absent = sorted(set(table) - known)
    files = pa.concat_tables([files, pa.table({"path": absent, "size": [0] * len(absent)}, schema=files.schema)])
    labels += [table[name] for name in absent]
    names = {name for label in labels if label for name in label}
    return pieces_of_files(files, pa.array(labels, PIECES.field("labels").type)), names


def _labelled_by_folder(uri: str, files: pa.Table) -> tuple[pa.Table, set[str]]:
    """Pieces and label names: the first folder, or the WordNet id that the name of a file at the top begins with."""
    folders: set[str] = set()
    names: set[str] = set()
    deep = False

    def labelled(part: pa.Table) -> pa.Table:
        nonlocal deep
        folder = pc.struct_field(pc.extract_regex(part["path"], r"(?s)^(?P<folder>[^/]*)/"), "folder")
        wordnet = pc.struct_field(pc.extract_regex(part["path"], r"(?s)^(?P<id>n\d{8})(?:[^0-9].*)?$"), "id")
        label = pc.coalesce(folder, wordnet).cast(pa.string()).combine_chunks()
        folders.update(pc.unique(folder).drop_null().to_pylist())
        names.update(pc.unique(label).drop_null().to_pylist())
        deep |= bool(pc.any(pc.greater(pc.count_substring(part["path"], "/"), 1)).as_py())
        offsets = np.cumsum(np.append(0, label.is_valid())).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(offsets), label.drop_null(), mask=label.is_null())
        return pieces_of_files(part, lists)

    pieces = listing.spilled(map(labelled, listing.in_batches(files)), PIECES)
    if folders and {f.lower() for f in folders} <= SPLIT_FOLDERS and deep:
        raise UserError(
            f"{uri}: its folders ({', '.join(sorted(folders))}) are splits, not classes; name one: "
            f"--source {uri}/{min(folders)}"
        )
    return pieces, names


# ---------------------------------------------------------------- reading


def read(source: Source, pieces: pa.Table) -> Iterator[Item]:
    """The files, in order."""
    read_files = _fetch if storage.is_remote(source.uri) else _load
    for batch in listing.in_batches(pieces):
        rows = batch.to_pylist()
        contents = read_files(source.uri, [row["path"] for row in rows if row["size"] <= items.MAX_FILE_BYTES])
        for row in rows:
            path, names = row["path"], row["labels"]
            key, where = source.prefix + path, storage.join(source.uri, path)
            if row["size"] > items.MAX_FILE_BYTES:
                yield Item(key, where, b"", names, too_large(row["size"]))
                continue
            data = next(contents)
            if isinstance(data, bytes):
                yield Item(key, where, data, names)
            elif isinstance(data, FileNotFoundError):
                yield Item(key, where, b"", names, Refused("missing file"))
            else:
                yield Item(key, where, b"", names, Refused("unreadable", str(data)))


def _load(folder: str, paths: list[str]) -> Iterator[bytes | Exception]:
    for path in paths:
        try:
            if os.path.isabs(path) or ".." in path.split("/"):  # from a label table
                raise FileNotFoundError(f"{path} lies outside the source")
            name = os.path.join(folder, path)
            storage.refuse_special(name)
            with open(name, "rb") as file:
                yield file.read()
        except (OSError, ValueError, UserError) as error:  # ValueError: a NUL in a name from a label table
            yield error


def _fetch(folder: str, paths: list[str]) -> Iterator[bytes | Exception]:
    """Objects of a store, REQUESTS at a time. An object that is not there is an input's fault and is returned; a store that
    still fails after ATTEMPTS is not: StorageError, since images must not become rejects because a server was busy."""

    def fetch(uri: str) -> bytes | Exception:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return storage.read_bytes(uri)
            except FileNotFoundError as error:
                return error
            except UserError as error:
                if attempt == ATTEMPTS:
                    raise storage.StorageError(f"{uri}: cannot be read after {ATTEMPTS} attempts ({error})") from error
                time.sleep(attempt)
        raise AssertionError

    with ThreadPoolExecutor(REQUESTS) as pool:
        for i in range(0, len(paths), REQUESTS):
            yield from pool.map(fetch, [f"{folder}/{path}" for path in paths[i : i + REQUESTS]])
