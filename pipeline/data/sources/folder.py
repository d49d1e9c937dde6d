"""Folders of image files: the class is the first folder, or a label table says it."""

import logging
import os
import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.codecs import Refused, is_image_data, is_image_name
from pipeline.data.sources import items, listing
from pipeline.data.sources.items import (
    FRAGMENTS,
    Item,
    ScanOptions,
    Source,
    fragments_of_files,
    is_included,
    too_large,
)
from pipeline.data.sources.layout import WORDNET, Layout, find_layout, folders_of
from pipeline.data.sources.tables import LabelTable, NoLabelColumn, read_label_table
from pipeline.errors import UserError, nearest

NAME = "folder"
TABLE_FILE = re.compile(  # tables that are found by themselves; they hold for the folder they lie in
    r"(?i)(?:(?P<folder>.*)/)?(?:(?:labels|metadata)\.(?:csv|tsv|jsonl|parquet)|val_annotations\.txt|loc_\w+_solution\.csv)"
)
logger = logging.getLogger(__name__)


def matches(path: str) -> bool:
    """Image files, by the ends of their names."""
    return is_image_name(path)


def scan(uri: str, files: pa.Table, options: ScanOptions) -> Source:
    """Every file is a fragment. Labels are those of a table (given, or found as labels.* or metadata.*), else the folders."""
    files, table, by_split = _tables(uri, files, options)
    if options.include:
        keep = [is_included(options.prefix + path.as_py(), options.include) for path in files["path"]]
        files = files.filter(pa.array(keep, pa.bool_()))
        if not files.num_rows:
            raise UserError(f"{uri}: nothing matches --include {' '.join(options.include)}")
    layout = _layout(uri, files, table, options)
    if table:
        fragments, names = _labelled_by_table(uri, files, table, layout)
    else:
        fragments, names = _labelled_by_folder(files, layout, by_split)
    splits = tuple(sorted(set(pc.unique(fragments["split"]).drop_null().to_pylist())))
    return Source(
        uri=uri,
        kind=NAME,
        prefix=options.prefix,
        fragments=fragments,
        names=frozenset(names),
        multilabel=any(found.multilabel for found in (table, *by_split.values())),
        by_folder=not table,
        splits=splits,
    )


def _tables(uri: str, files: pa.Table, options: ScanOptions) -> tuple[pa.Table, LabelTable, dict[str, LabelTable]]:
    """The files that are no tables, the table for all of them, and else the tables of single folders."""
    if options.table:
        return files, options.table, {}
    named = pc.match_substring_regex(files["path"], r"(?i)(?:labels|metadata|annotations|solution)\.[a-z]+$")
    found = [m for path in files.filter(named)["path"].to_pylist() if (m := TABLE_FILE.fullmatch(path))]
    if not found:
        return files, options.table, {}
    beside = pa.array([match[0] for match in found], pa.large_string())
    files = files.filter(pc.invert(pc.is_in(files["path"], beside)))
    tables: dict[str, LabelTable] = {}
    for match in found:
        folder = match["folder"] or ""
        if folder in tables:
            continue
        try:
            table = read_label_table(storage.join(uri, match[0]), options.columns, need_labels=not options.unlabelled)
        except NoLabelColumn as error:
            if "perhaps" in str(error):  # there may be labels under another name
                raise
            logger.warning("%s; the table is ignored", error)
            continue
        tables[folder] = table
    return (files, tables[""], {}) if "" in tables else (files, LabelTable(), tables)


def _layout(uri: str, files: pa.Table, table: LabelTable, options: ScanOptions) -> Layout:
    """Where the images' folders name splits and classes."""
    folders: set[tuple[str, ...]] = set()
    for batch in listing.in_batches(files):
        folders.update({tuple(folders_of(path)) for path in batch["path"].to_pylist() if matches(path)})
    layout = find_layout(folders, None if options.class_level is None else options.class_level - 1)
    if layout.class_level and not table.labels and options.class_level is None:
        example = next(iter(sorted(folders)))
        logger.info(
            "%s: the classes are the folders at level %d, such as %s; --class-level chooses another",
            uri,
            layout.class_level + 1,
            "/".join(example[: layout.class_level + 1]),
        )
    return layout


def _labelled_by_table(uri: str, files: pa.Table, table: LabelTable, layout: Layout) -> tuple[pa.Table, set[str]]:
    """Fragments and label names. Rows of the table without a file become fragments too, so that they are counted as missing."""
    paths = files["path"].to_pylist()
    rows = [table.find(path) for path in paths]
    labels = [None if row is None else table.labels.get(row) for row in rows]
    splits = [
        table.splits.get(row or "") or layout.split(folders_of(path)) for row, path in zip(rows, paths, strict=True)
    ]
    absent = sorted(set(table.labels) - set(rows))
    if table.labels and all(row is None for row in rows):
        raise UserError(
            f"{uri}: no file is named in the label table; it has {absent[0]!r}{nearest(absent[0], paths)}, the source has "
            f"{paths[0]!r}"
        )
    files = pa.concat_tables([files, pa.table({"path": absent, "size": [0] * len(absent)}, schema=files.schema)])
    labels += [table.labels[name] for name in absent]
    splits += [table.splits.get(name) for name in absent]
    names = {name for label in labels if label for name in label}
    label_type = FRAGMENTS.field("labels").type
    return fragments_of_files(files, pa.array(labels, label_type), pa.array(splits, pa.string())), names


def _labelled_by_folder(files: pa.Table, layout: Layout, tables: dict[str, LabelTable]) -> tuple[pa.Table, set[str]]:
    """Fragments and label names: of the class folder, or the WordNet id that the name of a file at the top begins with. Files
    in the folders of `tables` have the labels that the table says."""
    names: set[str] = set()

    def label_of(path: str, folders: list[str]) -> list[str] | None:
        for folder, table in tables.items():
            if path.startswith(f"{folder}/"):
                return table.lookup(path[len(folder) + 1 :])
        label = layout.label(folders)
        if label is None and not folders and (wordnet := WORDNET.match(path)):
            label = wordnet[1]
        return None if label is None else [label]

    def labelled(part: pa.Table) -> pa.Table:
        paths = part["path"].to_pylist()
        folders = [folders_of(path) for path in paths]
        labels = [label_of(path, inside) for path, inside in zip(paths, folders, strict=True)]
        names.update(name for label in labels for name in label or ())
        splits = pa.array([layout.split(inside) for inside in folders], pa.string())
        return fragments_of_files(part, pa.array(labels, FRAGMENTS.field("labels").type), splits)

    return listing.spilled(map(labelled, listing.in_batches(files)), FRAGMENTS), names


# ---------------------------------------------------------------- reading


def read(source: Source, fragments: pa.Table) -> Iterator[Item]:
    """The files, in order."""
    read_files = _fetch if storage.is_remote(source.uri) else _load
    for batch in listing.in_batches(fragments):
        rows = batch.to_pylist()
        contents = read_files(source.uri, [row["path"] for row in rows if row["size"] <= items.MAX_FILE_BYTES])
        for row in rows:
            path, names = row["path"], row["labels"]
            key, where = source.prefix + path, storage.join(source.uri, path)
            item = Item(key, where, b"", names, split=row["split"])
            if row["size"] > items.MAX_FILE_BYTES:
                yield item._replace(refused=too_large(row["size"]))
                continue
            data = next(contents)
            if isinstance(data, FileNotFoundError):
                yield item._replace(refused=Refused("missing file"))
            elif isinstance(data, Exception):
                yield item._replace(refused=Refused("unreadable", str(data)))
            elif names is None and not matches(path) and not is_image_data(data):
                yield item._replace(refused=Refused("not an image"))  # which says more than that it has no label
            else:
                yield item._replace(image=data)


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
    """Objects of a store. One that is not there is an input's fault and is returned; an outage is not, and raises
    StorageError: images must not become rejects because a server was busy."""
    return storage.read_many(f"{folder}/{path}" for path in paths)
